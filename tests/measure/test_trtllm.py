"""A TensorRT engine loaded and measured, over the stand-in: limits, memory, the clock, the machine that it is for."""

import argparse
import json

import pytest
import torch

from llama_engine import trtllm
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.config import EngineConfig
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError, RunError
from llama_engine.measure import protocol
from llama_engine.measure.result import load_result
from llama_engine.measure.stacks import TransformersStack
from llama_engine.measure.workload import workload_of
from llama_engine.report.render import render
from llama_engine.report.story import Story
from llama_engine.runner import ModelRunner
from tests.conftest import TRT_FLAGS, TRT_LIMITS
from tests.test_trtllm import toy

pytestmark = pytest.mark.usefixtures("installed")


@pytest.mark.usefixtures("small_ceilings")
def test_an_engine_is_measured_under_the_name_of_its_backend(trt_engine, tiny_model, tmp_path, monkeypatch, run_script):
    """The stand-in's speed means nothing; that its figures reach the report, and no ratio does, is the point."""
    tokens = ("--input-tokens", 8, "--output-tokens", 6, "--prefill-tokens", 16, "--warmup", 0)
    common = ("--engine-dir", trt_engine, "--model-dir", tiny_model, "--device", "cpu", "--threads", 1, *tokens)
    done = run_script("benchmarks/compare.py", *common, "--output", tmp_path / "box")
    assert done.returncode == 0, done.stderr
    page = render(Story.load(tmp_path / "box"))[0]
    assert "| TensorRT-LLM engine: TPOT, ms |" in page
    assert "the accuracy gate was not run on this engine (benchmarks/accuracy.py, which takes native ones)" in page
    assert "faster" not in page

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmark_optimized.py", *map(str, common)])
    protocol.main("", engine=True)
    result = load_result(tmp_path / "results/local/optimized-tensorrt_llm.json")
    assert result["backend"] == result["engine"]["kernels"] == "tensorrt_llm"
    monkeypatch.setattr(protocol, "open_engine", lambda *_, **__: pytest.fail("measured before the file was looked at"))
    with pytest.raises(InputError, match=r"optimized-tensorrt_llm\.json already exists"):
        protocol.main("", engine=True)


def test_a_prompt_of_any_length_that_fits_is_answered(tiny_model, tmp_path):
    convert(tiny_model, tmp_path / "c", ConvertOptions(int8=True))
    trtllm.build(tmp_path / "c", tmp_path / "e", EngineConfig(max_batch_size=1, max_seq_len=2048), TRT_FLAGS)
    prompt, options = list(range(300)) * 5, {"max_new_tokens": 2, "end_id": -1, "pad_id": 0}
    assert ModelRunner.from_dir(tmp_path / "e").generate([torch.tensor(prompt)], **options)[0, 0].tolist() == toy(
        prompt, 2
    )
    # Context attention reads a prompt in one step, so --max_num_tokens is a limit of its own.
    few = EngineConfig(max_batch_size=1, max_seq_len=2048, max_num_tokens=1499)
    trtllm.build(tmp_path / "c", tmp_path / "few", few, TRT_FLAGS)
    with pytest.raises(InputError, match=r"1500 tokens are more than the 1499 .* larger --max_num_tokens"):
        ModelRunner.from_dir(tmp_path / "few").generate([torch.tensor(prompt)], **options)
    asked = argparse.Namespace(model_dir=tiny_model, input_tokens=1500, output_tokens=8, prefill_tokens=0, batch=None)
    vars(asked).update(temperature=0, top_k=0, top_p=1, seed=0)
    with pytest.raises(InputError, match="--input-tokens: 1500 tokens are more than the 1499"):
        workload_of(asked, load_engine_json(tmp_path / "few", backend="tensorrt_llm"))


def test_what_fails_in_tensorrt_llm_is_one_line(trt_engine, monkeypatch):
    from tensorrt_llm.bindings import executor

    for free, streaming in ((0, False), (0, True)):
        monkeypatch.setitem(executor.gpu, "free", free)
        runner = ModelRunner.from_dir(trt_engine)
        with pytest.raises(RunError, match=r"TensorRT-LLM failed: .*KV cache is too small"):
            list(runner.generate([torch.tensor([5])], max_new_tokens=3, end_id=-1, pad_id=0, streaming=streaming))
        with pytest.raises(RunError, match=r"TensorRT-LLM failed: .*KV cache is too small"):
            list(runner.backend.stream([5], 3))


def test_the_kv_cache_leaves_memory_for_others(
    trt_engine, tiny_model, tmp_path, run_script, monkeypatch, small_ceilings
):
    """A baseline is loaded first, and of the rest an engine takes what one request at a time can use."""
    from tensorrt_llm.bindings import executor
    from tensorrt_llm.runtime import ModelRunnerCpp

    free = executor.gpu["free"]
    ModelRunner.from_dir(trt_engine)
    assert free - executor.gpu["free"] == 4 * 64 * executor.TOKEN_NBYTES
    loaded, init = [], TransformersStack.__init__
    monkeypatch.setattr(TransformersStack, "__init__", lambda *args: (loaded.append("baseline"), init(*args))[1])
    monkeypatch.setattr(ModelRunnerCpp, "loaded", loaded)
    tokens = ("--input-tokens", 8, "--output-tokens", 6, "--prefill-tokens", 0, "--warmup", 0, "--runs", 1)
    where = ("--engine-dir", trt_engine, "--model-dir", tiny_model, "--device", "cpu", "--output", tmp_path / "box")
    assert run_script("benchmarks/compare.py", *where, *tokens).returncode == 0
    assert loaded[0] == "baseline"
    assert loaded[1]["max_tokens_in_paged_kv_cache"] == 64


def test_the_executor_is_timed_and_gives_what_the_runner_gives(trt_engine, monkeypatch):
    stack = protocol.open_engine(trt_engine, load_engine_json(trt_engine, backend="tensorrt_llm"), device="cpu")
    monkeypatch.setattr(stack.stream.__self__.runner, "generate", lambda *_, **__: pytest.fail("the wrapper was timed"))
    run = stack.generate([5, 6], 7)
    assert run.token_ids == toy([5, 6], 7)[2:]
    assert len(run.token_times) == 7
    stream = stack.stream([5], 9)
    assert next(stream) == toy([5], 1)[1:]
    stream.close()  # a caller that leaves ends its request
    assert stack.stream.__self__.runner.session.active == {}


def test_an_engine_knows_the_gpu_and_the_release_it_is_for(trt_engine, tiny_checkpoint, tmp_path, monkeypatch):
    for arch, version, here in (
        ("sm90", "0.15.0", "sm90 and 0.15.0"),
        (None, "0.15.0", "no GPU"),
        ("sm80", "1.2.1", "1.2.1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(trtllm, "visible_arch", lambda arch=arch: arch)
            patch.setattr(trtllm.importlib.metadata, "version", lambda _, version=version: version)
            with pytest.raises(InputError, match=f"is for sm80 and TensorRT-LLM 0.15.0, here are .*{here}"):
                ModelRunner.from_dir(trt_engine)
    monkeypatch.setattr(trtllm, "visible_arch", lambda: None)
    with pytest.raises(InputError, match="needs the GPU that the engine is for"):
        trtllm.build(tiny_checkpoint, tmp_path / "e2", TRT_LIMITS, TRT_FLAGS)


def test_an_engine_of_several_ranks_is_served_not_loaded(tiny_model, tmp_path):
    convert(tiny_model, tmp_path / "c", ConvertOptions(int8=True, tp_size=2))
    trtllm.build(tmp_path / "c", tmp_path / "e", TRT_LIMITS, TRT_FLAGS)
    with pytest.raises(InputError, match=r"split over 2 ranks.*mpirun -n 2 \(scripts/serve_triton.sh"):
        ModelRunner.from_dir(tmp_path / "e")


def test_every_end_of_sequence_id_ends_an_answer_by_default(trt_engine, tiny_engine, edit_json):
    row = toy([5], 6)
    data = json.loads((trt_engine / "engine.json").read_text())
    edit_json(trt_engine / "engine.json", {"model": data["model"] | {"eos_token_ids": [row[5], row[3]]}})
    runner = ModelRunner.from_dir(trt_engine)
    asked = {"max_new_tokens": 6, "pad_id": 0, "return_dict": True, "output_sequence_lengths": True}

    def length(end_id, **options):
        return int(runner.generate([torch.tensor([5])], end_id=end_id, **asked, **options)["sequence_lengths"][0, 0])

    assert length(row[5]) == length(row[3]) == 4
    assert length(-1) == 7  # EOS ignored
    assert length(row[5], stop_words_list=[[]]) == 6


def test_a_server_of_nvidias_is_not_started_by_the_load_generator(trt_engine, run_script):
    done = run_script("benchmarks/benchmark_triton.py", "--engine-dir", trt_engine, "--output-tokens", 8)
    assert (done.returncode, "run scripts/serve_triton.sh, and give --url" in done.stderr) == (2, True)
