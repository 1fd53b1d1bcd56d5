"""The NVTX scripts without a GPU: every step is marked, and the fallback profile says what it cannot know."""

import json
from types import SimpleNamespace

import pytest

from llama_engine.measure import nsight, profile
from llama_engine.measure.cost import Cost
from llama_engine.measure.stacks import EngineStack, TensorRTStack, TransformersStack
from llama_engine.native import load_engine


@pytest.fixture
def ranges(monkeypatch):
    """Names of the ranges in the order they open; leaving is checked to be in step."""
    opened, depth = [], []

    class Mark:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            opened.append(self.name)
            depth.append(self.name)

        def __exit__(self, *_):
            assert depth.pop() == self.name

    monkeypatch.setattr(profile, "mark", Mark)
    yield opened
    assert not depth


def test_engine_steps_are_marked(ranges, tiny_engine):
    stack = EngineStack(load_engine(tiny_engine, device="cpu", kernels="torch"))
    with stack.marked(profile.mark):
        stack.generate(list(range(70)), 5)  # more than one prefill chunk: max_num_tokens is 64
    assert ranges == ["prefill"] * 2 + ["decode"] * 4
    assert "step" not in vars(stack.engine)


def test_steps_of_an_executor_are_marked(ranges):
    """As with TensorRT-LLM, of which no more is seen than when its tokens come."""

    def stream(prompt, new_tokens):
        yield from ([i] for i in range(new_tokens))

    stack = TensorRTStack(SimpleNamespace(stream=stream), Cost(1, 1, 1.0), {})
    with stack.marked(profile.mark):
        marked = stack.generate(list(range(70)), 5)
    assert ranges == ["prefill"] + ["decode"] * 4
    assert stack.generate(list(range(70)), 5).token_ids == marked.token_ids
    assert len(ranges) == 5  # the stack is as it was


def test_baseline_steps_and_phases_are_marked(ranges, tiny_model):
    stack = TransformersStack(tiny_model)
    with stack.marked(profile.mark):
        stack.generate([1, 2, 3], 4)
    assert [name for name in ranges if name in ("prefill", "decode")] == ["prefill"] + ["decode"] * 3
    assert ranges.count("attention") == ranges.count("mlp") == 2 * 4  # layers x forwards
    assert ranges.count("norm") == 4 * 4
    assert ranges.count("embedding") == ranges.count("lm_head") == 4


def test_scripts_and_fallback(run_script, tiny_model, tiny_engine, tmp_path):
    common = ["--model-dir", tiny_model, "--device", "cpu", "--output-tokens", 4, "--torch-profiler"]
    done = run_script("benchmarks/baseline_nvtx.py", *common, "--output", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    done = run_script("benchmarks/trt_nvtx.py", *common, "--engine-dir", tiny_engine, "--output", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    result = nsight.combine([str(tmp_path / "a.json"), str(tmp_path / "b.json")], "the PyTorch profiler")
    for name in ("transformers", "native"):
        stack = result["stacks"][name]
        assert stack["tokens"] == 3
        assert stack["launches_per_token"] is None
        assert sum(kernel["share"] for kernel in stack["top_kernels"]) <= 1 + 1e-9
    assert result["stacks"]["transformers"]["operators_per_token"] > 100
    assert json.loads((tmp_path / "b.json").read_text())["engine"]["kernels"]
    again = run_script("benchmarks/trt_nvtx.py", *common, "--engine-dir", tiny_engine, "--output", tmp_path / "b.json")
    assert again.returncode == 2
    assert "--force" in again.stderr
