"""The pages say what the code says."""

from __future__ import annotations

from pathlib import Path

from alignkit.losses import listing

DOCS = Path(__file__).parents[2] / "docs"


def test_the_formulas_are_those_of_the_tables() -> None:
    text = (DOCS / "formulas.md").read_text(encoding="utf-8")
    generated = text.split("<!-- begin: alignkit losses --markdown -->\n")[1].split("<!-- end -->")[
        0
    ]
    assert generated == listing.markdown() + "\n"


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
