"""Every relative link of a page leads to a file that is here."""

import re

import pytest

from tests.house import ROOT, files

pytestmark = pytest.mark.one_stack

PAGES = [path for path in files() if path.endswith(".md")]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def links_of(page: str) -> list[str]:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    return [link for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    missing = [link for link in links_of(page) if not ((ROOT / page).parent / link).exists()]
    assert not missing


def test_pages_that_others_name_in_code_style_are_here() -> None:
    named = {
        (page, name)
        for page in PAGES
        for name in re.findall(r"`(docs/[\w./-]+\.(?:md|json))`", (ROOT / page).read_text())
    }
    # The GPU's page is written by the first run on one.
    missing = sorted(each for each in named if not (ROOT / each[1]).exists() and "gpu" not in each[1])
    assert named and not missing
