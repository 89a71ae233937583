"""README.md and docs/api.md agree with the records, the files and the docstrings."""

import re
import sys

from m2r2kit.bench.records import ROOT
from m2r2kit.model.families import FAMILIES

sys.path.insert(0, str(ROOT / "ci"))

from api_page import PAGE, page
from readme_figures import draw

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_are_those_of_the_newest_records():
    assert draw(TEXT) == TEXT, "run: python ci/readme_figures.py"


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_notebook_is_listed():
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        assert f"notebooks/{path.name}" in TEXT


def test_every_family_is_named():
    words = set(re.findall(r"\w+", TEXT))
    assert [name for name in FAMILIES if name not in words] == []


def test_the_api_page_says_what_the_docstrings_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python ci/api_page.py"
