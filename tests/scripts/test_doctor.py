"""What the doctor says of a machine, of a checkpoint and of an engine; and that it needs nothing to say it."""

import json
import subprocess
import sys

import pytest

from llama_engine import trtllm
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.config import EngineConfig
from tests.conftest import ROOT, STANDIN, TRT_FLAGS

DOCTOR = "scripts/doctor.py"


def lines(text):
    """Verdict and finding of each subject."""
    rows = [line for line in text.splitlines() if line.startswith(("ok ", "note ", "missing "))]
    return {row[8:35].strip(): (row[:8].strip(), row[35:]) for row in rows}


def test_it_needs_no_package_at_all():
    done = subprocess.run([sys.executable, "-IS", DOCTOR], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")  # nothing was asked of either path
    said = lines(done.stdout)
    assert said["Python"][0] == "ok"
    assert said["GPU"] == ("note", "not looked for: PyTorch is missing")
    for backend, setup in (("native", "setup.sh"), ("tensorrt_llm", "setup.sh --trtllm")):
        verdict, what = said[f"{backend}: packages"]
        assert verdict == "missing"
        assert "torch, " in what
        assert what.endswith(f"source scripts/{setup}")
    command = [sys.executable, "-IS", DOCTOR, "--backend", "native", "--engine-dir", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, lines(done.stdout)["engine"]) == (1, ("note", "not looked into: torch is missing"))


def test_the_native_path_and_its_engine(run_script, tiny_engine):
    done = run_script(DOCTOR, "--backend", "native", "--engine-dir", tiny_engine)
    said = lines(done.stdout)
    assert said["native: packages"][0] == said["native: Triton"][0] == "ok", done.stdout
    assert said["engine: lengths"] == ("ok", "prompts up to 256 tokens, 256 with the answer")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "nothing is missing")
    done = run_script(DOCTOR, "--backend", "native", "--engine-dir", "nowhere")
    assert done.returncode == 1
    assert lines(done.stdout)["engine"][0] == "missing"
    assert done.stdout.endswith("1 missing: engine\n")


def test_without_the_library_it_is_the_one_thing_missing(run_script, tiny_checkpoint):
    done = run_script(DOCTOR, "--backend", "tensorrt_llm", "--checkpoint-dir", tiny_checkpoint)
    assert lines(done.stdout)["tensorrt_llm: library"][0] == "missing"
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "1 missing: tensorrt_llm: library")


@pytest.mark.usefixtures("installed")
def test_tensorrt_llms_path_its_checkpoint_and_its_engine(run_script, tiny_model, tmp_path, monkeypatch):
    convert(tiny_model, tmp_path / "c", ConvertOptions(int8=True))
    engine = EngineConfig(max_batch_size=4, max_seq_len=2048, max_num_tokens=1000)
    trtllm.build(tmp_path / "c", tmp_path / "e", engine, TRT_FLAGS)
    asked = ("--backend", "tensorrt_llm", "--checkpoint-dir", tmp_path / "c", "--engine-dir", tmp_path / "e")
    said = lines(run_script(DOCTOR, *asked).stdout)
    assert said["tensorrt_llm: library"] == ("ok", "0.15.0")
    assert said["tensorrt_llm: trtllm-build"] == ("ok", str(STANDIN / "bin/trtllm-build"))
    assert said["engine: lengths"] == ("ok", "prompts up to 1000 tokens, 2048 with the answer")
    model = json.loads((tmp_path / "e/engine.json").read_text())["model"]
    kv = 4 * model["num_layers"] * model["num_kv_heads"] * model["head_size"]
    assert said["engine: KV cache"][1].startswith(f"{4 * 2048 * kv / 1e9:.2f} GB serve all sequences")
    assert said["engine: built for"] == ("ok", "sm80, TensorRT-LLM 0.15.0")
    for module in ("llama_engine.trtllm", "llama_engine.checkpoint.packing"):
        monkeypatch.setattr(f"{module}.visible_arch", lambda: "sm90")
    done = run_script(DOCTOR, *asked)
    said = lines(done.stdout)
    assert said["checkpoint: layout"][0] == "missing"
    assert "convert with --target_arch sm90 --trtllm_version 0.15.0" in said["checkpoint: layout"][1]
    assert "here are sm90 and 0.15.0: build it again" in said["engine"][1]
    assert done.returncode == 1
