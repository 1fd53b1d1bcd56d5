"""The TensorRT-LLM backend against a strict stand-in of NVIDIA's package (tests/standin)."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from llama_engine import trtllm
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.unified import Checkpoint
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

STANDIN = Path(__file__).parent / "standin"
ROOT = Path(__file__).parent.parent
ENGINE = EngineConfig(max_batch_size=4, max_seq_len=64, max_num_tokens=8192)
FLAGS = {
    "gemm_plugin": "auto",
    "gpt_attention_plugin": "auto",
    "use_paged_context_fmha": "enable",
    "use_fused_mlp": "enable",
}


@pytest.fixture
def installed(monkeypatch):
    """The stand-in, importable and with trtllm-build on PATH, and a GPU in sight."""
    monkeypatch.setattr(trtllm, "visible_arch", lambda: "sm80")
    monkeypatch.syspath_prepend(str(STANDIN))
    monkeypatch.setenv(
        "PATH", f"{STANDIN / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture
def engine(installed, tiny_checkpoint, tmp_path):
    trtllm.build(tiny_checkpoint, tmp_path / "e", ENGINE, FLAGS)
    return tmp_path / "e"


def toy(prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append((7 * ids[-1] + 3) % 509)
    return ids


def test_the_command_gives_every_limit():
    command = trtllm.build_command("ckpt", "out", EngineConfig(), FLAGS)
    assert " ".join(command) == (
        "trtllm-build --checkpoint_dir ckpt --output_dir out --gemm_plugin auto --gpt_attention_plugin auto "
        "--use_paged_context_fmha enable --use_fused_mlp enable --max_batch_size 16 --max_seq_len 2048 "
        "--max_num_tokens 2048 --max_input_len 2048 --tokens_per_block 64 --output_timing_cache out/model.cache"
    )


def test_auto_takes_tensorrt_llm_where_it_is_installed(installed, capsys):
    assert trtllm.pick_backend("auto") == "tensorrt_llm"
    assert capsys.readouterr().out == "backend: tensorrt_llm (TensorRT-LLM is installed)\n"
    assert trtllm.pick_backend("native") == "native"


def test_auto_takes_native_elsewhere(capsys):
    assert trtllm.pick_backend("auto") == "native"
    assert "not installed" in capsys.readouterr().out


def test_build_makes_an_engine_directory_that_knows_its_origin(engine, tiny_checkpoint):
    info = load_engine_json(engine, backend="tensorrt_llm")
    assert (info.tensorrt_llm.arch, info.tensorrt_llm.version, info.tensorrt_llm.ranks) == ("sm80", "0.15.0", 1)
    assert info.checkpoint_sha256 == Checkpoint(tiny_checkpoint).sha256()
    assert info.engine == ENGINE
    assert info.identity == Checkpoint(tiny_checkpoint).identity
    build_config = json.loads((engine / "config.json").read_text())["build_config"]
    assert build_config["use_paged_context_fmha"] == "enable"
    assert build_config["max_seq_len"] == 64
    with pytest.raises(InputError, match=r"scripts/build_engine\.sh --backend native"):
        load_engine_json(engine)


def test_a_failed_build_leaves_nothing(installed, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(trtllm, "build_command", lambda *_: ["trtllm-build", "--unknown"])
    with pytest.raises(RunError, match="exit code 2"):
        trtllm.build(tiny_checkpoint, tmp_path / "e", ENGINE, FLAGS)
    assert list(tmp_path.iterdir()) == []


def test_a_layout_for_another_gpu_is_refused(installed, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(trtllm, "visible_arch", lambda: "sm90")
    convert(tiny_model, tmp_path / "a100", ConvertOptions(int8=True, target_arch="sm80"))
    with pytest.raises(InputError, match=r"need column_major: convert with --target_arch sm90 --trtllm_version 0.15.0"):
        trtllm.build(tmp_path / "a100", tmp_path / "e", ENGINE, FLAGS)
    for name, options in {
        "h100": ConvertOptions(int8=True, target_arch="sm90"),
        "portable": ConvertOptions(int8=True, quantize_at_build=True),
    }.items():
        convert(tiny_model, tmp_path / name, options)
        trtllm.build(tmp_path / name, tmp_path / f"e-{name}", ENGINE, FLAGS)


@pytest.mark.parametrize("return_dict", [False, True])
def test_generate_returns_what_the_native_runner_would(engine, return_dict):
    runner = ModelRunner.from_dir(engine)
    prompts = [[5, 6, 7], [9]]
    result = runner.generate(
        [torch.tensor(prompt) for prompt in prompts],
        max_new_tokens=4,
        end_id=-1,
        pad_id=0,
        return_dict=return_dict,
        output_sequence_lengths=return_dict,
    )
    output_ids = result["output_ids"] if return_dict else result
    assert output_ids.shape == (2, 1, 7)
    assert output_ids.dtype == torch.int32
    assert output_ids[0, 0].tolist() == toy(prompts[0], 4)
    assert output_ids[1, 0].tolist() == [*toy(prompts[1], 4), -1, -1]
    if return_dict:
        assert result["sequence_lengths"].tolist() == [[7], [5]]


def test_streaming_grows_from_the_prompt(engine):
    steps = ModelRunner.from_dir(engine).generate(
        [torch.tensor([5])],
        max_new_tokens=3,
        end_id=-1,
        pad_id=0,
        streaming=True,
        return_dict=True,
        output_sequence_lengths=True,
    )
    lengths = []
    for step in steps:
        lengths.append(int(step["sequence_lengths"][0, 0]))
        assert step["output_ids"][0, 0, : lengths[-1]].tolist() == toy([5], lengths[-1] - 1)
    assert lengths == [2, 3, 4]


def test_generation_stops_at_end_id(engine):
    end = toy([5], 2)[-1]
    result = ModelRunner.from_dir(engine).generate([torch.tensor([5])], max_new_tokens=9, end_id=end, pad_id=end)
    assert result[0, 0].tolist() == [*toy([5], 2), *[end] * 7]


def test_each_answer_ends_at_its_own_stop_words_too(engine):
    rows = [toy([5], 6), toy([9], 6)]
    result = ModelRunner.from_dir(engine).generate(
        [torch.tensor([5]), torch.tensor([9])],
        max_new_tokens=6,
        end_id=rows[0][4],
        pad_id=0,
        stop_words_list=[[[600], [rows[0][2]]], [[rows[1][3]]]],
        return_dict=True,
        output_sequence_lengths=True,
    )
    assert result["sequence_lengths"].tolist() == [[3], [4]]
    with pytest.raises(InputError, match="words for 1 prompts, but there are 2"):
        ModelRunner.from_dir(engine).generate([torch.tensor([5])] * 2, end_id=-1, pad_id=0, stop_words_list=[[]])


def test_the_runner_is_opened_with_memory_fraction_and_cuda_graphs(engine):
    from tensorrt_llm.runtime import ModelRunnerCpp

    ModelRunner.from_dir(engine, kv_cache_free_gpu_memory_fraction=0.5)
    assert ModelRunnerCpp.loaded[-1] == {
        "rank": 0,
        "max_batch_size": 4,
        "max_input_len": 64,
        "max_beam_width": 1,
        "kv_cache_free_gpu_memory_fraction": 0.5,
        "max_tokens_in_paged_kv_cache": 4 * 64,
        "cuda_graph_mode": True,
    }


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([5], {"end_id": None}, "end_id must be an int"),
        ([5], {"pad_id": 1.5}, "pad_id must be an int"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([], {}, "at least one token id"),
        ([512], {}, "token id 512 is outside the vocabulary of 512"),
        ([-1], {}, "token id -1 is outside the vocabulary of 512"),
        ([5] * 60, {"max_new_tokens": 5}, "60 prompt tokens . 5 new tokens exceed this engine's max_seq_len 64"),
    ],
)
def test_bad_requests_are_refused_before_tensorrt_llm_sees_them(engine, prompt, options, message):
    runner = ModelRunner.from_dir(engine)
    with pytest.raises(InputError, match=message):
        runner.generate([torch.tensor(prompt, dtype=torch.int64)], **({"end_id": -1, "pad_id": 0} | options))
    with pytest.raises(InputError, match="5 prompts, but the engine was built for 4"):
        runner.generate([torch.tensor([1])] * 5, end_id=-1, pad_id=0)


def test_an_engine_that_does_not_load_is_one_line(engine):
    (engine / "config.json").write_text(json.dumps({"build_config": {"max_batch_size": 1, "max_seq_len": 64}}))
    with pytest.raises(RunError, match="TensorRT-LLM could not load"):
        ModelRunner.from_dir(engine)


def test_without_the_package_the_install_command_is_named(engine, monkeypatch):
    monkeypatch.setattr(trtllm, "installed", lambda: False)
    with pytest.raises(InputError, match=r"source scripts/setup\.sh --trtllm"):
        ModelRunner.from_dir(engine)


@pytest.mark.usefixtures("small_ceilings")
def test_an_engine_is_measured_under_the_name_of_its_backend(engine, tiny_model, tmp_path, monkeypatch, run_script):
    """The stand-in's speed means nothing; that its figures reach the report, and no ratio does, is the point."""
    tokens = ("--input-tokens", 8, "--output-tokens", 6, "--prefill-tokens", 16, "--warmup", 0)
    common = ("--engine-dir", engine, "--model-dir", tiny_model, "--device", "cpu", "--threads", 1, *tokens)
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


@pytest.fixture
def build_script(installed, tiny_checkpoint, tmp_path, run_script, monkeypatch):
    command = ["scripts/build_engine.py", "--checkpoint_dir", tiny_checkpoint, "--output_dir", tmp_path / "e"]
    return lambda *args: run_script(*command, *args)


def test_the_build_script_runs_and_prints_the_exact_command(build_script, tiny_checkpoint, tmp_path):
    done = build_script("--backend", "tensorrt_llm", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == trtllm.build_command(
        tiny_checkpoint, tmp_path / "e", EngineConfig(max_num_tokens=8192), FLAGS
    )
    done = build_script("--kv_cache_free_gpu_memory_fraction", 0.6)
    assert done.returncode == 0, done.stderr
    assert "backend: tensorrt_llm (TensorRT-LLM is installed)" in done.stdout
    limits = load_engine_json(tmp_path / "e", backend="tensorrt_llm").engine
    assert (limits.max_num_tokens, limits.kv_cache_free_gpu_memory_fraction) == (8192, 0.6)
    assert (tmp_path / "e/model.cache").is_file()
    assert not (ROOT / "model.cache").exists()  # which is the working directory
    assert build_script("--force").returncode == 0  # over a timing cache too


def test_a_prompt_of_any_length_that_fits_is_answered(installed, tiny_model, tmp_path):
    convert(tiny_model, tmp_path / "c", ConvertOptions(int8=True))
    trtllm.build(tmp_path / "c", tmp_path / "e", EngineConfig(max_batch_size=1, max_seq_len=2048), FLAGS)
    prompt, options = list(range(300)) * 5, {"max_new_tokens": 2, "end_id": -1, "pad_id": 0}
    assert ModelRunner.from_dir(tmp_path / "e").generate([torch.tensor(prompt)], **options)[0, 0].tolist() == toy(
        prompt, 2
    )
    # Context attention reads a prompt in one step, so --max_num_tokens is a limit of its own.
    few = EngineConfig(max_batch_size=1, max_seq_len=2048, max_num_tokens=1499)
    trtllm.build(tmp_path / "c", tmp_path / "few", few, FLAGS)
    with pytest.raises(InputError, match=r"1500 tokens are more than the 1499 .* larger --max_num_tokens"):
        ModelRunner.from_dir(tmp_path / "few").generate([torch.tensor(prompt)], **options)
    asked = argparse.Namespace(model_dir=tiny_model, input_tokens=1500, output_tokens=8, prefill_tokens=0, batch=None)
    vars(asked).update(temperature=0, top_k=0, top_p=1, seed=0)
    with pytest.raises(InputError, match="--input-tokens: 1500 tokens are more than the 1499"):
        workload_of(asked, load_engine_json(tmp_path / "few", backend="tensorrt_llm"))


def test_what_fails_in_tensorrt_llm_is_one_line(engine, monkeypatch):
    from tensorrt_llm.bindings import executor

    for free, streaming in ((0, False), (0, True)):
        monkeypatch.setitem(executor.gpu, "free", free)
        runner = ModelRunner.from_dir(engine)
        with pytest.raises(RunError, match=r"TensorRT-LLM failed: .*KV cache is too small"):
            list(runner.generate([torch.tensor([5])], max_new_tokens=3, end_id=-1, pad_id=0, streaming=streaming))
        with pytest.raises(RunError, match=r"TensorRT-LLM failed: .*KV cache is too small"):
            list(runner.backend.stream([5], 3))


def test_the_kv_cache_leaves_memory_for_others(engine, tiny_model, tmp_path, run_script, monkeypatch, small_ceilings):
    """A baseline is loaded first, and of the rest an engine takes what one request at a time can use."""
    from tensorrt_llm.bindings import executor
    from tensorrt_llm.runtime import ModelRunnerCpp

    free = executor.gpu["free"]
    ModelRunner.from_dir(engine)
    assert free - executor.gpu["free"] == 4 * 64 * executor.TOKEN_NBYTES
    loaded, init = [], TransformersStack.__init__
    monkeypatch.setattr(TransformersStack, "__init__", lambda *args: (loaded.append("baseline"), init(*args))[1])
    monkeypatch.setattr(ModelRunnerCpp, "loaded", loaded)
    tokens = ("--input-tokens", 8, "--output-tokens", 6, "--prefill-tokens", 0, "--warmup", 0, "--runs", 1)
    where = ("--engine-dir", engine, "--model-dir", tiny_model, "--device", "cpu", "--output", tmp_path / "box")
    assert run_script("benchmarks/compare.py", *where, *tokens).returncode == 0
    assert loaded[0] == "baseline"
    assert loaded[1]["max_tokens_in_paged_kv_cache"] == 64


def test_the_executor_is_timed_and_gives_what_the_runner_gives(engine, monkeypatch):
    stack = protocol.open_engine(engine, load_engine_json(engine, backend="tensorrt_llm"), device="cpu")
    monkeypatch.setattr(stack.stream.__self__.runner, "generate", lambda *_, **__: pytest.fail("the wrapper was timed"))
    run = stack.generate([5, 6], 7)
    assert run.token_ids == toy([5, 6], 7)[2:]
    assert len(run.token_times) == 7
    stream = stack.stream([5], 9)
    assert next(stream) == toy([5], 1)[1:]
    stream.close()  # a caller that leaves ends its request
    assert stack.stream.__self__.runner.session.active == {}


@pytest.mark.parametrize("options", [{}, {"quantize_at_build": True}, {"dtype": "bfloat16"}, {"int8": False}])
def test_bytes_of_a_step_are_those_of_the_weights(tiny_model, tmp_path, options):
    options = {"int8": True} | options
    convert(tiny_model, tmp_path / "c", ConvertOptions(**options))
    source = Checkpoint(tmp_path / "c")
    linear = source.config.num_layers * 128 * (source.config.qkv_size + 128 + 3 * source.config.intermediate_size)
    outs = source.config.num_layers * (source.config.qkv_size + 2 * 128 + 2 * source.config.intermediate_size)
    norms = (2 * source.config.num_layers + 1) * 128
    matrices = linear + 2 * outs if options["int8"] else 2 * linear
    assert source.step_nbytes == matrices + 2 * (norms + 512 * 128)


def test_an_engine_knows_the_gpu_and_the_release_it_is_for(engine, tiny_checkpoint, tmp_path, monkeypatch):
    for arch, version, here in (
        ("sm90", "0.15.0", "sm90 and 0.15.0"),
        (None, "0.15.0", "no GPU"),
        ("sm80", "1.2.1", "1.2.1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(trtllm, "visible_arch", lambda arch=arch: arch)
            patch.setattr(trtllm.importlib.metadata, "version", lambda _, version=version: version)
            with pytest.raises(InputError, match=f"is for sm80 and TensorRT-LLM 0.15.0, here are .*{here}"):
                ModelRunner.from_dir(engine)
    monkeypatch.setattr(trtllm, "visible_arch", lambda: None)
    with pytest.raises(InputError, match="needs the GPU that the engine is for"):
        trtllm.build(tiny_checkpoint, tmp_path / "e2", ENGINE, FLAGS)


def test_an_engine_of_several_ranks_is_served_not_loaded(installed, tiny_model, tmp_path):
    convert(tiny_model, tmp_path / "c", ConvertOptions(int8=True, tp_size=2))
    trtllm.build(tmp_path / "c", tmp_path / "e", ENGINE, FLAGS)
    with pytest.raises(InputError, match=r"split over 2 ranks.*mpirun -n 2 \(scripts/serve_triton.sh"):
        ModelRunner.from_dir(tmp_path / "e")


def test_every_end_of_sequence_id_ends_an_answer_by_default(engine, tiny_engine, edit_json):
    row = toy([5], 6)
    data = json.loads((engine / "engine.json").read_text())
    edit_json(engine / "engine.json", {"model": data["model"] | {"eos_token_ids": [row[5], row[3]]}})
    runner = ModelRunner.from_dir(engine)
    asked = {"max_new_tokens": 6, "pad_id": 0, "return_dict": True, "output_sequence_lengths": True}

    def length(end_id, **options):
        return int(runner.generate([torch.tensor([5])], end_id=end_id, **asked, **options)["sequence_lengths"][0, 0])

    assert length(row[5]) == length(row[3]) == 4
    assert length(-1) == 7  # EOS ignored
    assert length(row[5], stop_words_list=[[]]) == 6


def test_a_server_of_nvidias_is_not_started_by_the_load_generator(engine, run_script):
    done = run_script("benchmarks/benchmark_triton.py", "--engine-dir", engine, "--output-tokens", 8)
    assert (done.returncode, "run scripts/serve_triton.sh, and give --url" in done.stderr) == (2, True)
