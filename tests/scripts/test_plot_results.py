"""The pages that the repository shows: staleness is seen, nothing lies there twice."""

import shutil
from pathlib import Path

from tests.results import ENVIRONMENT


def test_check_sees_every_kind_of_staleness(folder, run_script, edit_json, coarse_pictures):
    root = folder.parents[1]
    (root / "README.md").write_text("before\n<!-- results:begin -->\n<!-- results:end -->\nafter\n")
    other = folder.with_name("other")
    other.mkdir()
    shutil.copy(folder / "optimized-native.json", other)  # few pictures
    done = run_script("scripts/plot_results.py", "--root", root, "--headline", "box")
    assert done.returncode == 0, done.stderr
    check = ("scripts/plot_results.py", "--root", root, "--check")
    shutil.copytree(folder, folder.with_name("my-gpu"))  # as run_all.sh --name makes: on nobody's page yet
    done = run_script(*check)
    assert done.returncode == 0, done.stderr
    assert run_script(*check[:2], root / "nowhere", check[3]).returncode == 2
    headline = (root / "results" / "PERFORMANCE_REPORT.md").read_text()
    assert "## Other machines" in headline
    assert "(other/PERFORMANCE_REPORT.md)" in headline
    assert [path.name for path in folder.iterdir() if path.suffix != ".json"] == []  # all of it is above
    assert (other / "performance_comparison.png").is_file()
    readme = (root / "README.md").read_text()
    assert "(results/PERFORMANCE_REPORT.md)" in readme
    assert "(results/other/PERFORMANCE_REPORT.md)" in readme
    assert readme.startswith("before\n")
    assert "2.00x" in readme
    (root / "README.md").write_text(readme.replace("2.00x", "9.00x"))
    gone = {"PERFORMANCE_REPORT.sources.json", "waterfall.png", "report.html"}
    for name in gone:
        (root / "results" / name).unlink()
    copy = root / "results" / "executive_summary.png"
    shutil.copy(copy, folder)  # of what is above
    shutil.copy(other / "performance_comparison.png", copy.with_name("ladder.png"))  # of one that led before
    assert sorted(stale(run_script(*check))) == sorted({"README.md", *gone, copy.name, "ladder.png"})
    measured = (folder / "triton-native.json").read_bytes()
    edit_json(folder / "triton-native.json", {"validity": {"status": "INVALID", "reasons": ["by an older rule"]}})
    assert "triton-native.json (its verdict)" in stale(run_script(*check))
    done = run_script("scripts/plot_results.py", "--root", root, "--headline", "box", "--judge")
    assert f"judged again: {folder / 'triton-native.json'}\n" in done.stdout
    assert (folder / "triton-native.json").read_bytes() == measured
    assert run_script(*check).returncode == 0
    edit_json(folder / "baseline.json", {"environment": ENVIRONMENT | {"command": "other.py"}})
    assert {"PERFORMANCE_REPORT.md", "roofline.png", "report.html"} <= set(stale(run_script(*check)))


def stale(done):
    assert done.returncode == 1
    return [Path(item).name for item in done.stderr.split("stale: ")[1].split(": run")[0].split(", ")]
