"""What the repository publishes: every result fits the schema, and report, pictures and README agree with it."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from llama_engine.errors import InputError
from llama_engine.measure.result import load_result, result_files

ROOT = Path(__file__).parents[2]
PUBLISHED = [x for x in sorted((ROOT / "results").iterdir()) if x.is_dir() and x.name != "local"]
PAGES = [path for path in sorted((ROOT / "results").rglob("PERFORMANCE_REPORT.md")) if path.parent.name != "local"]
TABLES = {
    "Summary": 1,
    "Set-up": 1,
    "Latency of one request": 2,
    "Throughput at several requests": 1,  # and one of non-streaming requests
    "Where the time goes": 4,
    "Accuracy of the same engine": 1,
    "Cost of a million output tokens": 1,
    "From baseline to server, step by step": 1,
}
NUMBER = re.compile(r"[+-]?\d+(?:[.,]\d+)*(?:e[+-]\d+)?%?")


@pytest.mark.parametrize(
    "path",
    [path for folder in PUBLISHED for path in result_files(folder)],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_published_results_are_valid_json_of_the_schema(path):
    load_result(path)


def test_nothing_published_is_stale(run_script):
    done = run_script("scripts/plot_results.py", "--check")
    assert done.returncode == 0, done.stderr


def tables(page):
    """(section, rows of cells) of each table."""
    parts = [part.partition("\n")[::2] for part in page.read_text(encoding="utf-8").split("\n## ")]
    found = [(title, x.splitlines()) for title, part in parts for x in re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)]
    return [(title, [row[1:-1].split(" | ") for row in rows]) for title, rows in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_published_reports_hold_every_table(page):
    headline = re.match(r"<!-- headline: (\S+) -->", page.read_text(encoding="utf-8"))
    folder = ROOT / "results" / headline[1] if headline else page.parent
    peers = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("tournaments/*.json")]
    measured = sum(not peer.get("by_hand") for peer in peers)
    expected = TABLES | {"Other machines": bool(headline), "Other engines on the same GPU model": measured}
    if not measured:  # figures entered by hand stand in for those that nobody measured
        expected["Other engines on the same GPU model"] = len(peers)
    expected["The precision ladder"] = any(folder.glob("ladder-*.json"))
    expected["Accuracy of the same engine"] = (folder / "accuracy-native.json").exists()
    expected["Do answers depend on their company"] = int((folder / "determinism-native.json").exists())
    expected["When a replica dies"] = 2 * (folder / "failover.json").exists()
    expected["Throughput at several requests"] += (folder / "triton-native-whole.json").exists()
    assert Counter(title for title, _ in tables(page)) == Counter(expected)
    judged = expected["Accuracy of the same engine"]
    assert judged or "**No speed-up is shown:** the accuracy gate was not run" in page.read_text(encoding="utf-8")
    assert all(len(rows) > 2 for _, rows in tables(page))  # heads and a line under them


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_figure_of_a_published_table_has_a_source(page):
    sources = json.loads(page.with_suffix(".sources.json").read_text(encoding="utf-8"))
    checked = 0
    for title, (_, _, *rows) in tables(page):
        known = {number for figures in sources[title].values() for number in NUMBER.findall(figures)}
        for _, *cells in rows:
            numbers = NUMBER.findall(" ".join(cells))
            assert known.issuperset(numbers), (title, cells)
            checked += len(numbers)
    assert checked > 150


def test_a_foreign_json_would_be_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"tokens_per_second": 9000}')
    with pytest.raises(InputError, match=r"x\.json: .*required"):
        load_result(tmp_path / "x.json")


def test_report_and_pictures_need_neither_pytorch_nor_the_engine():
    scripts = "scripts/plot_results.py", "scripts/show_results.py", "scripts/compare_results.py"
    code = f"""
import runpy, sys
import llama_engine.report, llama_engine.report.plots
for script in {scripts}:
    runpy.run_path(script)
foreign = "torch transformers triton safetensors llama_engine.engine.engine llama_engine.measure.protocol".split()
print(*(name for name in foreign if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
