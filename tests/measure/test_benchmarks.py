"""The scripts from end to end on the tiny model, and what they refuse."""

import json
import shutil

import pytest
import torch

from llama_engine import native
from llama_engine.measure import protocol
from llama_engine.measure.result import load_folder
from llama_engine.native import load_engine
from llama_engine.serving.server import free_port

SMOLLM2 = "models/smollm2-135m-instruct"  # the fixture smollm2_model, which makes it
SHORT = ("--device", "cpu", "--threads", 1, "--output-tokens", 6, "--input-tokens", 5, "--warmup", 1, "--runs", 5)


pytestmark = pytest.mark.usefixtures("small_ceilings")


@pytest.fixture
def run_main(run_script):
    return lambda script, *args: run_script(f"benchmarks/{script}.py", *args)


def test_compare_writes_three_results(run_main, tiny_model, tiny_engine, tmp_path):
    where = ("--model-dir", tiny_model, "--engine-dir", tiny_engine, "--output", tmp_path / "tiny")
    batches = ("--prefill-tokens", 40, "--batch", 2, 4, "--batch-output-tokens", 4)
    batches += ("--temperature", 0.8, "--top-p", 0.9, "--seed", 3)
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
    assert [level["concurrency"] for level in after["levels"]] == [2, 4, 1, 2, 4]
    drawn = [level["workload"].get("sampling") for level in after["levels"]]
    assert drawn == [None] * 2 + [{"temperature": 0.8, "top_k": 0, "top_p": 0.9, "seed": 3}] * 3
    assert all(level["summary"]["output_tokens_per_s"]["p50"] > 0 for level in after["levels"])
    assert printed.count("sampled") == 3
    assert after["levels"][1]["samples"]["output_tokens"] == [4] * 12
    assert [part["checks"]["prefix_cache_hit_tokens"] for part in (after, *after["levels"])] == [0] * 6
    assert "MBU" in printed
    assert "synthetic weights" in printed
    valid = before["validity"]["status"] == after["validity"]["status"] == "VALID"
    assert bool(results["comparison"]["speedup"]) == valid


def test_sampling_is_measured_beside_greedy(run_main, tiny_engine):
    flags = ("--engine-dir", tiny_engine, "--device", "cpu", "--threads", 1, "--output-tokens", 3, "--rounds", 2)
    done = run_main("sampling", *flags, "--batch", 1, 2)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"{count} at once") for count in (1, 2)] == [1, 1]
    assert "top-p" in done.stdout
    for more, message in (
        (("--batch", 5), "--batch 5: this engine was built for 1 to 4"),
        (("--batch", 1, "--rounds", 0), "--rounds"),
    ):
        done = run_main("sampling", *flags, *more)
        assert (done.returncode, message in done.stderr) == (2, True)


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


def test_the_gates_reference_takes_its_memory_before_the_engine_does(
    run_main, tiny_model, tiny_engine, tmp_path, monkeypatch
):
    """An engine's KV cache takes most of what is free, and the reference needs room for one sequence alone."""
    opened = []

    def observed(engine_dir, **options):
        opened.append((options.get("kernels"), options.get("max_batch_size")))
        return load_engine(engine_dir, **options)

    monkeypatch.setattr(native, "load_engine", observed)
    monkeypatch.setattr(protocol, "load_engine", observed)
    where = ("--model-dir", tiny_model, "--engine-dir", tiny_engine, "--output", tmp_path / "accuracy-native.json")
    done = run_main("accuracy", *where, "--device", "cpu", "--window", 64)
    assert done.returncode == 0, done.stderr
    assert opened == [("torch", 1), ("auto", None)]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("baseline", ["--model-dir", "nowhere"], "nowhere"),
        ("baseline", ["--output-tokens", 0], "--output-tokens must be at least 1"),
        ("baseline", ["--threads", 0], "--threads"),
        ("baseline", ["--output", "README.md"], "already exists: give --force"),
        ("benchmark_optimized", ["--engine-dir", "nowhere"], "nowhere is not an engine"),
        ("benchmark_optimized", ["--batch", 99], "--batch 99: this engine was built for 1 to 4"),
        ("benchmark_optimized", ["--top-p", 2], "top_p must be a number in [0, 1], got 2"),
        ("compare", ["--runs", 0], "--runs must be at least 1"),
        ("compare", ["--output", "README.md"], "README.md is a file"),
        ("accuracy", ["--window", 1], "--window must be 2 to 256"),
        ("accuracy", ["--text", "nowhere.txt"], "nowhere.txt does not exist"),
        ("accuracy", ["--text", "results/waterfall.png"], "waterfall.png is not UTF-8"),
        ("accuracy", ["--model-dir", SMOLLM2, "--text", "tests/__init__.py"], "fewer than two tokens"),
        ("accuracy", ["--model-dir", SMOLLM2, "--greedy-tokens", 225], "--greedy-tokens: 32 prompt tokens + 225 new"),
        ("accuracy", ["--greedy-tokens", 0], "--greedy-tokens at least 1"),
        ("accuracy", ["--greedy-prompts", -1], "--greedy-prompts must be at least 0"),
    ],
)
def test_bad_input_is_one_line(run_main, tiny_model, tiny_engine, smollm2_model, tmp_path, script, flags, message):
    common = ["--model-dir", tiny_model, "--output", tmp_path / "x.json", "--device", "cpu"]
    if script != "baseline":
        common += ["--engine-dir", tiny_engine]
    if script == "benchmark_optimized":
        common += ["--output-tokens", 2, "--warmup", 0, "--runs", 1, "--prefill-tokens", 0]
    if script == "accuracy":
        common += ["--window", 64]
    done = run_main(script, *common, *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.json").exists()


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("benchmarks/benchmark_triton.py", ["--rate", "nan"], "--timeout must be positive"),
        ("benchmarks/benchmark_triton.py", ["--input-tokens", "16:8"], "1 <= LOW <= HIGH, got '16:8'"),
        ("benchmarks/benchmark_triton.py", ["--output_tokens", "9:225"], "--output-tokens: 32 prompt tokens + 225 new"),
        ("benchmarks/benchmark_triton.py", ["--slo", "ttft_ms:1.2.3"], "--slo takes ttft_ms:MS"),
        ("benchmarks/benchmark_triton.py", ["--output", "results", "--force"], "results is a directory"),
        ("benchmarks/benchmark_triton.py", ["--model-dir", "x", "--url", "y"], "--model-dir takes the place of"),
        ("scripts/serve_triton.py", ["--drain-s", "nan"], "must be finite and not negative"),
        ("scripts/serve_triton.py", ["--http-port", 8001], "ports must differ, got 8001, 8001, 8002"),
        pytest.param("scripts/serve_triton.py", ["--device", "cuda"], "no CUDA GPU is visible", marks=NO_GPU),
    ],
)
def test_bad_flags_of_serving_are_one_line(run_script, tiny_engine, script, flags, message):
    done = run_script(script, "--engine-dir", tiny_engine, *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_without_a_server_is_one_line(run_script, smollm2_engine, protocol):
    where = ("--engine-dir", smollm2_engine, "--protocol", protocol, "--url", f"127.0.0.1:{free_port()}")
    done = run_script("benchmarks/triton_client.py", *where, "--wait", 0.3)
    assert done.returncode == 1
    note, error = done.stderr.splitlines()
    assert note.startswith("waiting up to 0.3 s")
    assert "no server is ready" in error


def test_another_models_engine_is_refused(run_main, tiny_engine, tiny_model, tmp_path, edit_json):
    other = tmp_path / "engine"
    shutil.copytree(tiny_engine, other)
    identity = {"name": "other", "source": "synthetic", "sha256": "0" * 64}
    edit_json(other / "engine.json", {"model_identity": identity})
    done = run_main("compare", "--model-dir", tiny_model, "--engine-dir", other, "--output", tmp_path / "r")
    assert done.returncode == 2
    assert "was built from other" in done.stderr
