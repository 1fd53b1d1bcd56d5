"""The scripts from end to end on the tiny model, and what they refuse."""

import json
import shutil

import pytest

from llama_engine.measure.result import load_folder

SHORT = ("--device", "cpu", "--threads", 1, "--output-tokens", 6, "--input-tokens", 5, "--warmup", 1, "--runs", 5)


pytestmark = pytest.mark.usefixtures("small_ceilings")


@pytest.fixture
def run_main(run_script):
    return lambda script, *args: run_script(f"benchmarks/{script}.py", *args)


def test_compare_writes_three_results(run_main, tiny_model, tiny_engine, tmp_path):
    where = ("--model-dir", tiny_model, "--engine-dir", tiny_engine, "--output", tmp_path / "tiny")
    batches = ("--prefill-tokens", 40, "--batch", 2, 4, "--batch-output-tokens", 4)
    done = run_main("compare", *where, *batches, *SHORT)
    assert done.returncode == 0, done.stderr
    printed, results = done.stdout, load_folder(tmp_path / "tiny")
    assert set(results) == {"baseline", "optimized-native", "comparison"}
    before, after = results["baseline"], results["optimized-native"]
    for result in (before, after):
        assert result["samples"]["output_tokens"] == [6] * 5
        assert len(result["samples"]["itl_ms"]) == 25
        assert len(result["samples"]["prefill_ttft_ms"]) == 5
        assert result["summary"]["mbu"] > 0
        assert result["model"]["source"] == "synthetic"
        assert len(result["workload"]["prompt_ids"]) == 5
        assert result["telemetry"]["gpu_power_w"] is None
    assert len(before["checks"]["first_token_ids"]) == len(after["checks"]["first_token_ids"]) == 6
    assert [level["concurrency"] for level in after["levels"]] == [2, 4]
    assert after["levels"][1]["samples"]["output_tokens"] == [4] * 12
    assert "MBU" in printed
    assert "synthetic weights" in printed
    valid = before["validity"]["status"] == after["validity"]["status"] == "VALID"
    assert bool(results["comparison"]["speedup"]) == valid


def test_single_benchmarks_and_accuracy(run_main, tiny_model, tiny_engine, tmp_path):
    model = ("--model-dir", tiny_model)
    done = run_main("baseline", *model, *SHORT, "--prefill-tokens", 0, "--output", tmp_path / "baseline.json")
    assert done.returncode == 0, done.stderr
    done = run_main("accuracy", *model, "--engine-dir", tiny_engine, "--device", "cpu", "--window", 64,
                      "--output", tmp_path / "accuracy-native.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "accuracy-native.json").read_text())["summary"]
    assert 0 <= figures["logit_error_rms"] < 0.01
    assert "perplexity_ratio" not in figures


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("baseline", ["--model-dir", "nowhere"], "nowhere"),
        ("baseline", ["--output-tokens", 0], "--output-tokens must be at least 1"),
        ("baseline", ["--threads", 0], "--threads"),
        ("baseline", ["--output", "README.md"], "already exists: give --force"),
        ("benchmark_optimized", ["--engine-dir", "nowhere"], "nowhere is not an engine"),
        ("benchmark_optimized", ["--batch", 99], "--batch 99: this engine was built for 1 to 4"),
        ("compare", ["--runs", 0], "--runs must be at least 1"),
        ("accuracy", ["--window", 1], "--window must be 2 to 256"),
        ("accuracy", ["--text", "nowhere.txt"], "nowhere.txt does not exist"),
    ],
)
def test_bad_input_is_one_line(run_main, tiny_model, tiny_engine, tmp_path, script, flags, message):
    common = ["--model-dir", tiny_model, "--output", tmp_path / "x.json", "--device", "cpu"]
    if script != "baseline":
        common += ["--engine-dir", tiny_engine]
    if script == "benchmark_optimized":
        common += ["--output-tokens", 2, "--warmup", 0, "--runs", 1, "--prefill-tokens", 0]
    done = run_main(script, *common, *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.json").exists()


def test_another_models_engine_is_refused(run_main, tiny_engine, tiny_model, tmp_path, edit_json):
    other = tmp_path / "engine"
    shutil.copytree(tiny_engine, other)
    identity = {"name": "other", "source": "synthetic", "sha256": "0" * 64}
    edit_json(other / "engine.json", {"model_identity": identity})
    done = run_main("compare", "--model-dir", tiny_model, "--engine-dir", other, "--output", tmp_path / "r")
    assert done.returncode == 2
    assert "was built from other" in done.stderr
