"""The TensorRT-LLM backend against a strict stand-in of NVIDIA's package (tests/standin)."""

import json

import pytest
import torch

from llama_engine import trtllm
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.config import EngineConfig
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError, RunError
from llama_engine.runner import ModelRunner
from tests.conftest import ROOT, TRT_FLAGS, TRT_LIMITS


def toy(prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append((7 * ids[-1] + 3) % 509)
    return ids


def test_the_command_gives_every_limit():
    command = trtllm.build_command("ckpt", "out", EngineConfig(), TRT_FLAGS)
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


def test_build_makes_an_engine_directory_that_knows_its_origin(trt_engine, tiny_checkpoint):
    info = load_engine_json(trt_engine, backend="tensorrt_llm")
    assert (info.tensorrt_llm.arch, info.tensorrt_llm.version, info.tensorrt_llm.ranks) == ("sm80", "0.15.0", 1)
    assert info.checkpoint_sha256 == Checkpoint(tiny_checkpoint).sha256()
    assert info.engine == TRT_LIMITS
    assert info.identity == Checkpoint(tiny_checkpoint).identity
    build_config = json.loads((trt_engine / "config.json").read_text())["build_config"]
    assert build_config["use_paged_context_fmha"] == "enable"
    assert build_config["max_seq_len"] == 64
    with pytest.raises(InputError, match=r"scripts/build_engine\.sh --backend native"):
        load_engine_json(trt_engine)


def test_a_failed_build_leaves_nothing(installed, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(trtllm, "build_command", lambda *_: ["trtllm-build", "--unknown"])
    with pytest.raises(RunError, match="exit code 2"):
        trtllm.build(tiny_checkpoint, tmp_path / "e", TRT_LIMITS, TRT_FLAGS)
    assert list(tmp_path.iterdir()) == []


def test_a_layout_for_another_gpu_is_refused(installed, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(trtllm, "visible_arch", lambda: "sm90")
    convert(tiny_model, tmp_path / "a100", ConvertOptions(int8=True, target_arch="sm80"))
    with pytest.raises(InputError, match=r"need column_major: convert with --target_arch sm90 --trtllm_version 0.15.0"):
        trtllm.build(tmp_path / "a100", tmp_path / "e", TRT_LIMITS, TRT_FLAGS)
    for name, options in {
        "h100": ConvertOptions(int8=True, target_arch="sm90"),
        "portable": ConvertOptions(int8=True, quantize_at_build=True),
    }.items():
        convert(tiny_model, tmp_path / name, options)
        trtllm.build(tmp_path / name, tmp_path / f"e-{name}", TRT_LIMITS, TRT_FLAGS)


@pytest.mark.parametrize("return_dict", [False, True])
def test_generate_returns_what_the_native_runner_would(trt_engine, return_dict):
    runner = ModelRunner.from_dir(trt_engine)
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


def test_streaming_grows_from_the_prompt(trt_engine):
    steps = ModelRunner.from_dir(trt_engine).generate(
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


def test_generation_stops_at_end_id(trt_engine):
    end = toy([5], 2)[-1]
    result = ModelRunner.from_dir(trt_engine).generate([torch.tensor([5])], max_new_tokens=9, end_id=end, pad_id=end)
    assert result[0, 0].tolist() == [*toy([5], 2), *[end] * 7]


def test_each_answer_ends_at_its_own_stop_words_too(trt_engine):
    rows = [toy([5], 6), toy([9], 6)]
    result = ModelRunner.from_dir(trt_engine).generate(
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
        ModelRunner.from_dir(trt_engine).generate([torch.tensor([5])] * 2, end_id=-1, pad_id=0, stop_words_list=[[]])


def test_the_runner_is_opened_with_memory_fraction_and_cuda_graphs(trt_engine):
    from tensorrt_llm.runtime import ModelRunnerCpp

    ModelRunner.from_dir(trt_engine, kv_cache_free_gpu_memory_fraction=0.5)
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
def test_bad_requests_are_refused_before_tensorrt_llm_sees_them(trt_engine, prompt, options, message):
    runner = ModelRunner.from_dir(trt_engine)
    with pytest.raises(InputError, match=message):
        runner.generate([torch.tensor(prompt, dtype=torch.int64)], **({"end_id": -1, "pad_id": 0} | options))
    with pytest.raises(InputError, match="5 prompts, but the engine was built for 4"):
        runner.generate([torch.tensor([1])] * 5, end_id=-1, pad_id=0)


def test_an_engine_that_does_not_load_is_one_line(trt_engine):
    (trt_engine / "config.json").write_text(json.dumps({"build_config": {"max_batch_size": 1, "max_seq_len": 64}}))
    with pytest.raises(RunError, match="TensorRT-LLM could not load"):
        ModelRunner.from_dir(trt_engine)


def test_without_the_package_the_install_command_is_named(trt_engine, monkeypatch):
    monkeypatch.setattr(trtllm, "installed", lambda: False)
    with pytest.raises(InputError, match=r"source scripts/setup\.sh --trtllm"):
        ModelRunner.from_dir(trt_engine)


@pytest.fixture
def build_script(installed, tiny_checkpoint, tmp_path, run_script, monkeypatch):
    command = ["scripts/build_engine.py", "--checkpoint_dir", tiny_checkpoint, "--output_dir", tmp_path / "e"]
    return lambda *args: run_script(*command, *args)


def test_the_build_script_runs_and_prints_the_exact_command(build_script, tiny_checkpoint, tmp_path):
    done = build_script("--backend", "tensorrt_llm", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == trtllm.build_command(
        tiny_checkpoint, tmp_path / "e", EngineConfig(max_num_tokens=8192), TRT_FLAGS
    )
    done = build_script("--kv_cache_free_gpu_memory_fraction", 0.6)
    assert done.returncode == 0, done.stderr
    assert "backend: tensorrt_llm (TensorRT-LLM is installed)" in done.stdout
    limits = load_engine_json(tmp_path / "e", backend="tensorrt_llm").engine
    assert (limits.max_num_tokens, limits.kv_cache_free_gpu_memory_fraction) == (8192, 0.6)
    assert (tmp_path / "e/model.cache").is_file()
    assert not (ROOT / "model.cache").exists()  # which is the working directory
    assert build_script("--force").returncode == 0  # over a timing cache too


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
