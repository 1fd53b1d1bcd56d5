"""What a GPU gives against what a user sees: by hand, in the report, the picture and the page."""

import json
import re
import shutil

import pytest
from matplotlib import pyplot as plt

from llama_engine.measure.stats import summary
from llama_engine.report import pareto
from llama_engine.report.page import PAGE, render_page, source_of_page
from llama_engine.report.story import Story

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def level(users, tpot_ms, rate, joules, status="VALID"):
    samples = {"tpot_ms": [tpot_ms] * 5, "ttft_ms": [9.0] * 5, "latency_s": [0.8, 0.9, 1.0, 1.1, 1.2]}
    summed = {key: summary(values) for key, values in samples.items()}
    summed |= {"output_tokens_per_s": summary([rate]), "energy_j_per_token": joules}
    verdict = {"status": status, "reasons": ["1 requests </script> failed"] if status == "INVALID" else []}
    return {"concurrency": users, "samples": samples, "summary": summed, "validity": verdict}


@pytest.fixture
def served(folder, edit_json):
    """One load that counts, one that a better one beats, and one that is INVALID."""
    levels = [
        level(1, 10, 100, 3.0),
        level(4, 20, 180, 1.0),
        level(8, 15, 400, 0.5),
        level(16, 12, 900, 0.2, "INVALID"),
    ]
    edit_json(folder / "triton-native.json", {"levels": levels, "samples": {}})
    for name in ("baseline", "optimized-native", "comparison", "accuracy-native", "determinism-native"):
        (folder / f"{name}.json").unlink()
    return folder


def test_points_by_hand(served):
    found = pareto.points(Story.load(served, 3.6))
    assert [(x.load, round(x.per_user, 2), x.per_gpu, x.joules) for x in found] == [
        ("1 at once", 100, 100, 3.0), ("4 at once", 50, 180, 1.0), ("8 at once", 66.67, 400, 0.5),
        ("16 at once", 83.33, 900, 0.2),
    ]  # fmt: skip
    assert found[0].dollars == pytest.approx(3.6 / 3600 * 1e6 / 100)
    low, high = found[0].per_gpu_ci
    assert 0.85 * 100 < low < 100 < high < 100 / 0.85  # the mean latency is known to about a tenth
    assert found[0].dollars_ci == pytest.approx((1e3 / high, 1e3 / low))
    assert found[0].per_user_ci == (100, 100)
    assert [point.load for point in pareto.frontier(found)] == ["8 at once", "1 at once"]
    assert pareto.points(Story.load(served))[0].dollars is None


def test_invalid_points_are_hollow(served):
    figure, title = pareto.draw(Story.load(served, 3.6))
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "output tokens/s of one machine", "J per output token, board", "$ per million output tokens",
    ]  # fmt: skip
    faces = [bars.lines[0].get_markerfacecolor() for bars in figure.axes[0].containers]
    assert faces.count("white") == 1
    assert title == "400 tokens/s a machine at 67 tokens/s a user (8 at once)"
    plt.close(figure)


def test_the_price_stands_in_the_report(served, run_script, coarse_pictures):
    done = run_script("scripts/plot_results.py", "--results-dir", served, "--price-per-hour", 3.6)
    assert done.returncode == 0, done.stderr
    report = (served / "PERFORMANCE_REPORT.md").read_text()
    assert "At $3.6 an hour:" in report
    assert re.search(r"\| through Triton, 8 at once \| 66\.7 \[.*\| 2\.500 \[2\.\d+, 2\.\d+\] \|", report)
    assert "through Triton, 16 at once*" in report
    assert "[report.html](report.html)" in report
    assert (served / PAGE).is_file()
    assert run_script("scripts/plot_results.py", "--results-dir", served).returncode == 0
    assert "$" not in (served / "PERFORMANCE_REPORT.md").read_text()


@pytest.mark.parametrize("flags", [["--price-per-hour", "0"], ["--price-per-hour", "1", "--check"]])
def test_a_price_that_makes_no_sense_is_one_line(run_script, flags):
    done = run_script("scripts/plot_results.py", *flags)
    assert done.returncode == 2
    assert "--price-per-hour" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_page_holds_all_it_needs(served):
    story = Story.load(served)
    text = render_page(story)
    assert source_of_page(text) == story.sha256
    assert not re.search(r'(?:src|href)="(?!PERFORMANCE_REPORT\.md)', text)
    assert "sourceMappingURL" not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [load["status"] for load in data["loads"]] == ["VALID", "VALID", "VALID", "INVALID"]
    assert data["loads"][0]["quantiles"]["latency_s"][50] == 1.0
    assert len(text) < 300_000


@pytest.mark.skipif(BROWSER is None, reason="no Chromium found")
def test_the_page_draws_in_a_browser_without_a_network(served):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    (served / PAGE).write_text(render_page(Story.load(served, 3.6)))
    errors, asked = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{served / PAGE}")
        page.select_option("#against", "dollars")
        page.select_option("#metric", "latency_s")
        sets = page.evaluate(
            "tradeoff.data.datasets.map((set) => [set.label, set.pointBackgroundColor, set.data.length])"
        )
        browser.close()
    assert errors == []
    assert asked == [f"file://{served / PAGE}"]
    assert sets == [["through Triton", [*["#7f7f7f"] * 3, "#fff"], 4]]
