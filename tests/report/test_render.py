"""Report and pictures from result files: nothing is shown that should not be, nothing is missing, staleness is seen."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from llama_engine.errors import InputError
from llama_engine.measure.result import new_result, write_result
from llama_engine.measure.stats import bootstrap_ratio, summary
from llama_engine.report import plots
from llama_engine.report import render as report
from llama_engine.report.story import Story, best_load

ENVIRONMENT = {
    "cpu": {"name": "A CPU", "cores": 2, "threads": 2, "memory_gb": 8.0, "l3_bytes": 1 << 20},
    "device": "cpu", "gpu": None, "command": "benchmarks/compare.py --runs 5",
    "software": {"torch": "2"}, "git": {"commit": "0" * 40, "dirty": False}, "fingerprint": "f" * 16,
    "read_bandwidth": {"device": "cpu", "bytes_per_s": 1e10, "buffer_bytes": 1, "method": "m"},
    "matmul": {"device": "cpu", "flop_per_s": 1e12, "method": "m"},
}  # fmt: skip
COST = {"weight_nbytes": 10**7, "kv_nbytes_per_token": 1000, "flop_per_token": 1e7}
WEIGHTS = "e" * 64


def measurement(benchmark, backend, seconds, **more):
    samples = {
        "ttft_ms": [30.0] * 5,
        "tpot_ms": [s * 100 for s in seconds],
        "latency_s": seconds,
        "output_tokens": [8] * 5,
    }
    summed = {key: summary(samples[key]) for key in ("ttft_ms", "tpot_ms", "latency_s")}
    summed |= {"itl_ms": summed["tpot_ms"], "output_tokens_per_s": summary([8 / s for s in seconds]), "mbu": 0.5,
               "mfu": 0.1, "step_nbytes": 1e7, "gpu_utilization_pct": None}  # fmt: skip
    model = {"name": "m", "source": more.pop("source", "pretrained"), "sha256": "a" * 64}
    workload = {"input_tokens": 4, "output_tokens": 8, "concurrency": 1, "warmup_runs": 1, "timed_runs": 5}
    return new_result(benchmark, backend, model=model, workload=workload, environment=ENVIRONMENT,
                      samples=samples, summary=summed, cost=COST, **more)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A complete folder: baseline 1 s, engine 0.5 s, Triton at 1 and 2, accuracy passed."""
    root = tmp_path / "results" / "box"
    engine = {"weights_sha256": WEIGHTS, "kernels": "k"}
    base = measurement("baseline", "transformers", [1.0] * 5)
    fast = measurement("optimized", "native", [0.5] * 5, engine=engine)
    both = measurement("comparison", "native", [1.0] * 5, engine=engine)
    both["samples"] = both["summary"] = {}
    both["speedup"] = {
        key: bootstrap_ratio([1.0] * 5, [0.5] * 5) for key in ("latency", "ttft", "tpot", "output_tokens_per_s")
    }
    triton = measurement("triton", "native", [0.6] * 5)
    triton["levels"] = [{"concurrency": n, "summary": triton["summary"]} for n in (1, 2)]
    gate = {"status": "PASSED", "reasons": []}
    figures = {"tokens": 20_000, "perplexity_baseline": 10.0, "perplexity_engine": 10.01, "perplexity_ratio": 1.001,
               "kl_mean": 0.001, "kl_max": 0.1, "top1_agreement": 0.99}  # fmt: skip
    accuracy = measurement("accuracy", "native", [1.0] * 5, engine=engine, gate=gate)
    accuracy["summary"] = figures
    for name, content in (("baseline", base), ("optimized-native", fast), ("comparison", both),
                          ("triton-native", triton), ("accuracy-native", accuracy)):  # fmt: skip
        write_result(root / f"{name}.json", content)
    return root


def page(folder):
    return report.render(Story.load(folder))


def test_a_complete_report(folder):
    text = page(folder)
    assert "**2.00x** [2.00, 2.00] faster" in text
    assert "No speed-up" not in text
    assert "comparison.json:speedup.latency" in text
    assert "Gate: **PASSED**" in text
    assert "Scaling from 1 to 2 requests: 1.00x, 50% of linear" in text
    assert "| through Triton | 75.000 | +12.50 |" in text
    assert text == page(folder)


def test_every_source_comment_leads_to_a_value(folder):
    story, text = Story.load(folder), page(folder)
    sources = [s for line in text.splitlines() if line.startswith("<!-- sources: ") for s in line[14:-4].split(", ")]
    assert len(sources) > 40
    for source in sources:
        file, _, path = source.partition(":")
        assert story.get(file, path) is not None, source


def test_no_speedup_without_the_accuracy_gate(folder, edit_json):
    edit_json(folder / "accuracy-native.json", {"gate": {"status": "FAILED", "reasons": ["kl_mean 0.5 is above 0.01"]}})
    assert "2.00x" not in page(folder)
    assert "the accuracy gate failed: kl_mean 0.5" in page(folder)
    edit_json(
        folder / "accuracy-native.json",
        {"engine": {"weights_sha256": "f" * 64}, "gate": {"status": "PASSED", "reasons": []}},
    )
    text = page(folder)
    assert "run on another engine" in text
    assert "    ./scripts/run_all.sh --device cpu --model-dir DIR --name box\n" in text
    (folder / "accuracy-native.json").unlink()
    assert "2.00x" not in page(folder)
    assert "gate was not run" in page(folder)


def test_invalid_runs_give_no_ratio(folder, edit_json):
    invalid = {"status": "INVALID", "reasons": ["1 requests failed"]}
    for name in ("comparison", "triton-native"):
        edit_json(folder / f"{name}.json", {"validity": invalid})
    text = page(folder)
    assert "2.00x" not in text
    assert "of linear" not in text
    assert "through Triton, 1 at once (INVALID)" in text
    assert "> **INVALID** triton-native.json: 1 requests failed" in text


def test_scaling_ends_at_the_largest_load_that_counts(folder, edit_json):
    assert "Scaling from 1 to 2 requests" in page(folder)
    levels = json.loads((folder / "triton-native.json").read_text())["levels"]
    bad = levels[1] | {"concurrency": 4, "validity": {"status": "INVALID", "reasons": ["GPU clocks were throttled"]}}
    edit_json(folder / "triton-native.json", {"levels": [*levels, bad]})
    assert "Scaling from 1 to 2 requests" in page(folder)


def test_missing_parts_are_said_to_be_missing(folder):
    for name in ("triton-native", "accuracy-native", "comparison", "optimized-native"):
        (folder / f"{name}.json").unlink()
        text = page(folder)
        assert plots.draw_all(Story.load(folder), folder)
    assert "Triton Inference Server was not measured" in text
    assert "No profile was taken" in text
    assert "no paired comparison was run" in text
    (folder / "baseline.json").unlink()
    with pytest.raises(InputError, match="holds no result files"):
        Story.load(folder)


def test_synthetic_weights_are_stamped(folder, edit_json):
    for path in folder.glob("*.json"):
        edit_json(path, {"model": {"name": "m", "source": "synthetic", "sha256": "a" * 64}})
    edit_json(
        folder / "accuracy-native.json", {"summary": {"tokens": 9, "logit_error_rms": 0.001, "logit_error_max": 0.002}}
    )
    text = page(folder)
    assert "    ./scripts/run_all.sh --device cpu --synthetic m --name box\n" in text
    assert "**Synthetic weights.**" in text
    assert "perplexity, 16-bit" not in text
    assert "1.00e-03" in text
    assert "**synthetic weights**" in report.readme_block([Story.load(folder)])


def test_pictures_carry_their_source(folder):
    story = Story.load(folder)
    paths = plots.draw_all(story, folder)
    assert [path.name for path in paths] == list(plots.PICTURES)
    for path in paths:
        with Image.open(path) as picture:
            assert picture.info["Source-SHA256"] == story.sha256
            assert min(picture.size) > 700


def test_waterfall_needs_the_same_workload(folder, edit_json):
    assert len(plots.waterfall_steps(Story.load(folder))) == 3
    edit_json(folder / "triton-native.json", {"workload": {"input_tokens": 4, "output_tokens": 9}})
    assert len(plots.waterfall_steps(Story.load(folder))) == 2


def test_check_sees_every_kind_of_staleness(folder, run_script, edit_json):
    root = folder.parents[1]
    (root / "README.md").write_text("before\n<!-- results:begin -->\n<!-- results:end -->\nafter\n")
    shutil.copytree(folder, folder.with_name("other"))
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
    readme = (root / "README.md").read_text()
    assert readme.startswith("before\n")
    assert "2.00x" in readme
    (root / "README.md").write_text(readme.replace("2.00x", "9.00x"))
    assert stale(run_script(*check)) == ["README.md"]
    (root / "README.md").write_text(readme)
    edit_json(folder / "baseline.json", {"environment": ENVIRONMENT | {"command": "other.py"}})
    assert {"PERFORMANCE_REPORT.md", "roofline.png"} <= set(stale(run_script(*check)))


def stale(done):
    assert done.returncode == 1
    return [Path(item).name for item in done.stderr.split("stale: ")[1].split(": run")[0].split(", ")]


def test_compare_results(folder, run_script, edit_json, tmp_path):
    new = tmp_path / "new"
    shutil.copytree(folder, new)
    compare = ("scripts/compare_results.py", folder, new)
    assert run_script(*compare).returncode == 0
    slow = json.loads((new / "baseline.json").read_text())["samples"] | {"latency_s": [1.1] * 5}
    edit_json(new / "baseline.json", {"samples": slow})
    done = run_script(*compare)
    assert done.returncode == 3
    assert "REGRESSION" in done.stdout
    assert run_script(*compare, "--tolerance", "0.2").returncode == 0
    edit_json(new / "baseline.json", {"environment": ENVIRONMENT | {"fingerprint": "0" * 16}})
    assert run_script(*compare).returncode == 4
    forced = run_script(*compare, "--force")
    assert forced.returncode == 3
    assert "DIFFERENT MACHINES" in forced.stdout
    edit_json(new / "baseline.json", {"validity": {"status": "INVALID", "reasons": ["x"]}})
    assert run_script(*compare, "--force").returncode == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"validity": {"status": "INVALID", "reasons": ["clocks were throttled"]}}, "INVALID: clocks were throttled"),
        ({"workload": {"input_tokens": 4, "output_tokens": 9}}, "workload.output_tokens is 8 and 9"),
    ],
)
def test_compare_leaves_out_levels_that_cannot_be_compared(folder, run_script, edit_json, tmp_path, change, reason):
    new = tmp_path / "new"
    level = {"workload": {"input_tokens": 4, "output_tokens": 8}, "samples": {"latency_s": [1.0] * 5}, "concurrency": 2}
    level |= {"summary": {}, "validity": {"status": "VALID", "reasons": []}}
    edit_json(folder / "optimized-native.json", {"levels": [level]})
    shutil.copytree(folder, new)
    slow = level | {"samples": {"latency_s": [2.0] * 5}}
    edit_json(new / "optimized-native.json", {"levels": [slow]})
    assert run_script("scripts/compare_results.py", folder, new).returncode == 3
    edit_json(new / "optimized-native.json", {"levels": [slow | change]})
    done = run_script("scripts/compare_results.py", folder, new)
    assert done.returncode == 0
    assert "left out: optimized-native, 2 at once:" in done.stdout
    assert reason in " ".join(done.stdout.split())


def test_a_bad_load_is_marked_and_leaves_the_speed_up_standing(folder, edit_json):
    triton = json.loads((folder / "triton-native.json").read_text())
    triton["levels"][1]["validity"] = {"status": "INVALID", "reasons": ["GPU clocks were throttled"]}
    edit_json(folder / "triton-native.json", {"levels": triton["levels"]})
    text = page(folder)
    assert "through Triton, 2 at once (INVALID)" in text
    assert "through Triton, 1 at once (INVALID)" not in text
    assert "**INVALID** triton-native.json at 2: GPU clocks were throttled." in text
    assert "**2.00x** [2.00, 2.00] faster" in text
    assert re.search(r"\d at 1, [\d,]+ at 2\*\.", text)
    loads = Story.load(folder).throughput("triton")
    assert [mark for *_, mark in loads] == ["", "*"]
    assert best_load(loads) == loads[0]
    assert best_load(loads[1:]) == loads[1]


def test_noise_is_named_beside_the_ratio(folder, edit_json):
    caution = {"status": "VALID", "reasons": [], "cautions": ["latency spread (p75 - p25) / p50 is 30%"]}
    edit_json(folder / "baseline.json", {"validity": caution})
    text = page(folder)
    assert "**Noisy** baseline.json: latency spread (p75 - p25) / p50 is 30%." in text
    assert "**2.00x** [2.00, 2.00] faster" in text


def test_peers_stand_above_the_machine_they_were_measured_on(folder):
    peers = {"machine": "box", "note": "Another run.", "peers": [{"engine": "other", "alone": 5.5, "8": 1234}]}
    block = report.readme_block([Story.load(folder)], peers)
    assert "| other | 5.5 |  | 1,234 |  |  |" in block
    assert "| **this engine**, INT8 weight-only" in block
    assert "| 16.0 | 30.0 |" in block  # 8 tokens in half a second
    assert "other" not in report.readme_block([Story.load(folder)], peers | {"machine": "elsewhere"})
