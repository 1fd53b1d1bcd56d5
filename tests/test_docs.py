"""What the pages say of the code that a machine can check: the rooms' imports, and that every file named exists."""

import re

import pytest

from tests.conftest import ROOT
from tests.test_rooms import BASE, ROOMS

PAGES = ("README.md", "CONTRIBUTING.md", "docs/USAGE.md", "docs/STRUCTURE.md", "docs/DESIGN.md", "docs/SCALING.md")
LIBRARY = ROOT / "llama_engine"
ROOTS = [ROOT, ROOT / "scripts", LIBRARY, *(path for path in LIBRARY.iterdir() if path.is_dir())]
FILE = re.compile(r"`([\w./-]+\.(?:py|sh|cpp|h|cu|cuh|md|j2|json))\b")
MADE = {"comparison.json", "baseline.json", "profile.json", "engine.json", "tuning.json", "PERFORMANCE_REPORT.md"}
MADE |= {f"{name}-native.json" for name in ("optimized", "accuracy", "determinism", "triton")}
MADE |= {"triton-native-whole.json", "PERFORMANCE_REPORT.sources.json"}  # written by a run, so not in the source tree


def test_the_table_of_rooms_says_what_each_may_import():
    page = (ROOT / "docs/DESIGN.md").read_text(encoding="utf-8")
    stated = {
        room: set(re.findall(r"`(\w+)`", imports)) | (BASE if "the base" in imports else set())
        for room, imports in re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page, re.MULTILINE)
    }
    assert {room: stated[room] & ROOMS.keys() for room in ROOMS} == ROOMS


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    named = set(FILE.findall((ROOT / page).read_text(encoding="utf-8"))) - MADE
    assert named
    assert not [name for name in sorted(named) if not any((root / name).exists() for root in ROOTS)]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not ((ROOT / page).parent / link).exists()]
