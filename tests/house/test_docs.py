"""The pages say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from alignkit.cite import entries
from alignkit.losses import DIVERGENCES, LOSSES, listing, modifiers

DOCS = Path(__file__).parents[2] / "docs"


def test_the_formulas_are_those_of_the_tables() -> None:
    text = (DOCS / "formulas.md").read_text(encoding="utf-8")
    generated = text.split("<!-- begin: alignkit losses --markdown -->\n")[1].split("<!-- end -->")[
        0
    ]
    assert generated == listing.markdown() + "\n"


def test_the_formulas_name_every_modifier() -> None:
    text = (DOCS / "formulas.md").read_text(encoding="utf-8").split("### Modifiers")[1]
    kinds = {*DIVERGENCES, *modifiers.TIMESTEP_WEIGHTINGS, *modifiers.WEIGHTINGS}
    for name in {*kinds, "nats", "anchor", "safeguard", "ld_alpha"} - {"reverse_kl", "uniform"}:
        assert f"`{name}`" in text, name
    for number in ("2409.06411", "2511.03317", "2411.10442", "2404.19733", "2406.11827"):
        assert number in text and number in entries()


def test_the_choice_of_a_loss_names_losses_and_tests_that_exist() -> None:
    text = (DOCS / "how-to-choose.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| [^|]+ \| ([^|]+) \|", text, re.MULTILINE):
        for name in re.findall(r"`(\w+)[`(]", row):
            assert name in LOSSES or name in ("p_chosen", "margin"), name
    tests = DOCS.parent / "tests"
    cited = re.findall(r"`(?:tests/)?((?:\w+/)?test_\w+\.py)`", text)
    assert len(cited) > 5 and all(list(tests.rglob(name)) for name in cited)


def test_links_between_pages_lead_somewhere() -> None:
    for page in [DOCS.parent / "README.md", *DOCS.glob("*.md")]:
        for part in page.read_text(encoding="utf-8").split("](")[1:]:
            target = part.split(")")[0]
            if not target.startswith(("http", "#")):
                assert (page.parent / target.split("#")[0]).exists(), (page.name, target)


def test_the_readme_s_tree_names_real_files() -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    tree = text.split("## The tree")[1].split("To know the library")[0]
    names = [line.split()[0] for line in tree.splitlines() if line.startswith("      ")]
    assert len(names) > 10
    for name in names:
        assert (DOCS.parent / "alignkit" / name).exists(), name
