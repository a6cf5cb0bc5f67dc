"""The docs as a whole: every page can be found, every link leads somewhere, every key of a config is told of."""

import re
from pathlib import Path

import pytest

from stages import dpo, pt, sft
from stages.data.source import Source

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data/README.md"]
)


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page):
    """The headings of a page as a link names them."""
    heads = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_names_every_page_in_its_list_and_in_its_tree():
    tree, _, listed = text("README.md").partition("## The tree")[2].partition("## Read next")
    for page in PAGES:
        if page.parent == Path("docs"):
            assert f"({page})" in listed
            assert page.name in tree


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("config", [Source, pt.Config, sft.Config, dpo.Config], ids=["data", "pt", "sft", "dpo"])
def test_every_key_is_told_of(config):
    filled_in = {"others", "weights"}  # by the pipeline
    missing = [key for key in config.model_fields if key not in filled_in and f"`{key}`" not in text("docs/config.md")]
    assert missing == []
