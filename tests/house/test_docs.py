"""The pages say what the code says."""

from __future__ import annotations

from pathlib import Path

from alignkit.losses import PREFERENCE_LOSSES

DOCS = Path(__file__).parents[2] / "docs"


def test_every_loss_has_its_line_in_the_formulas() -> None:
    lines = (DOCS / "formulas.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    assert set(PREFERENCE_LOSSES) <= set(rows)
    for name, loss in PREFERENCE_LOSSES.items():
        arxiv = [word.strip(",;.") for word in loss.paper.replace("arXiv:", "").split()]
        ids = [word for word in arxiv if word[:4].isdigit() and "." in word]
        assert ids and all(number in rows[name] for number in ids), name
        for keyword, default in loss.keywords.items():
            if default not in (0.0, True):
                assert f"{keyword}={default:g}" in rows[name], (name, keyword)


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
