"""The load scripts against this repository's own gateway, and against a llama.cpp server where it is installed."""

import csv
import json
import os
import subprocess
import sys

import httpx
import numpy as np
import pytest
from gguf import GGUFWriter

from llama_engine.checkpoint.hf import HFModel
from llama_engine.measure.result import load_result
from llama_engine.serving.server import free_port
from tests.llm_demo.conftest import wait_for

pytestmark = pytest.mark.slow

PYTHON = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)  # of an environment with llama-cpp-python[server]
FEW = ("--concurrency", 2, "--requests", 6, "--input-tokens", 12)


@pytest.fixture
def measured(run_script, smollm2_model, tmp_path):
    """Run benchmark_server.py and return its result; a busy machine may make it INVALID, which is no error."""

    def run(url, *flags):
        output = tmp_path / "served.json"
        where = ("--url", url, "--tokenizer", smollm2_model, "--output", output, "--force", "--device", "cpu")
        done = run_script("benchmarks/benchmark_server.py", *where, *map(str, flags))
        assert done.returncode in (0, 1), done.stderr
        assert output.exists(), done.stderr
        return load_result(output)

    return run


@pytest.mark.parametrize(
    ("endpoint", "api", "prompt_as"),
    [("completions", "openai-completions", "ids"), ("chat", "openai-chat", "messages")],
)
def test_the_gateway_is_measured_through_its_openai_api(gateway, measured, tmp_path, endpoint, api, prompt_as):
    table = tmp_path / "levels.csv"
    flags = ("--endpoint", endpoint, "--output-tokens", "4:9", "--slo", "mlperf-server", "--csv", table)
    result = measured(f"{gateway}/v1", *FEW, *flags)
    assert (result["target"]["api"], result["target"]["prompt_as"]) == (api, prompt_as)
    assert result["target"]["refused"] == []
    assert result["model"] == {"name": "SmolLM2-135M-Instruct", "source": "unknown", "sha256": None}
    level = result["levels"][0]
    assert level["failures"] == {}
    assert all(4 <= n <= 9 for n in level["samples"]["output_tokens"])
    assert len(level["samples"]["ttft_ms"]) == 6
    assert level["checks"]["tokens_counted_by"] == {"server": 6}
    assert level["checks"]["tokens_by_server"] == sum(level["samples"]["output_tokens"])
    template = 0 if endpoint == "completions" else 20  # tokens that the chat template adds
    assert all(n >= 12 + template for n in level["samples"]["input_tokens"])
    assert level["summary"]["goodput"]["name"] == "mlperf-server"
    assert result["null_model"]["responses_per_s"] > 100
    rows = list(csv.DictReader(table.open()))
    assert [(row["mode"], row["concurrency"]) for row in rows] == [("closed", "2")]
    assert float(rows[0]["ttft_ms_p50"]) == pytest.approx(level["summary"]["ttft_ms"]["p50"])


def test_a_conversation_finds_its_history_in_the_prefix_cache(gateway, measured, tmp_path):
    workload = tmp_path / "talk.json"
    workload.write_text('{"input_tokens": 70, "output_tokens": 6, "turns": 3, "think_s": 0.01}')
    flags = ("--workload", workload, "--concurrency", 1, "--requests", 3, "--prefix-cache")
    result = measured(gateway, *flags)
    assert result["workload"]["traffic"]["prefix_cache_can_help"]
    level = result["levels"][0]
    assert level["samples"]["input_tokens"] == [70, 146, 222]
    assert level["checks"]["shared_prompt_tokens"] >= 64 + 128


def test_a_tournament_of_two_doors_to_one_engine(gateway, triton, run_script, smollm2_model, tmp_path):
    workload, output = tmp_path / "w.json", tmp_path / "t.json"
    workload.write_text('{"input_tokens": 12, "output_tokens": 4}')
    targets = ("--target", f"http={gateway}", "--target", f"grpc=grpc://{triton.grpc_url}", "--workload", workload)
    flags = ("--concurrency", 1, "--rounds", 5, "--per-user", 1, "--model-dir", smollm2_model, "--device", "cpu")
    done = run_script("benchmarks/tournament.py", *targets, *flags, "--output", output)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(output.read_text())
    assert [x["target"]["api"] for x in result["contestants"]] == ["openai-completions", "triton-grpc"]
    assert [x["samples"]["output_tokens"] for x in result["levels"]] == [[4] * 5] * 2
    assert [x["memory"] for x in result["contestants"]] == ["unknown"] * 2


@pytest.fixture(scope="module")
def llama_cpp_server(smollm2_model, tmp_path_factory):
    """A llama.cpp server over a two-layer model of random weights with SmolLM2's tokenizer, written as GGUF."""
    found = subprocess.run([PYTHON, "-c", "import llama_cpp.server.app"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("llama-cpp-python[server] is not installed (LLAMA_CPP_PYTHON may name a Python that has it)")
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, smollm2_model)
    port = free_port()
    command = [PYTHON, "-m", "llama_cpp.server", "--model", file, "--port", port, "--n_ctx", 512, "--n_threads", 1]
    process = subprocess.Popen([*map(str, command), "--host", "127.0.0.1"], stdout=subprocess.DEVNULL)

    def ready():
        try:
            return process.poll() is not None or httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_for(ready, "the llama.cpp server")
        assert process.poll() is None
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def write_gguf(file, model_dir):
    """float32, two layers of width 64, seeded."""
    layers, width, heads, inner = 2, 64, 4, 128
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    pieces = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    merges = [x if isinstance(x, str) else " ".join(x) for x in tokenizer["model"]["merges"]]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer, rng = GGUFWriter(str(file), "llama"), np.random.default_rng(0)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if i in special else 1 for i in range(len(pieces))])  # control, normal
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)

    def tensor(name, *shape):
        array = np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.05, shape)
        writer.add_tensor(f"{name}.weight", array.astype(np.float32))

    assert len(pieces) == HFModel(model_dir).config.vocab_size
    tensor("token_embd", len(pieces), width)
    tensor("output_norm", width)
    tensor("output", len(pieces), width)
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{i}.{name}", width)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{i}.{name}", width, width)
        for name in ("ffn_gate", "ffn_up"):
            tensor(f"blk.{i}.{name}", inner, width)
        tensor(f"blk.{i}.ffn_down", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_llama_cpp_server_is_measured_unchanged(llama_cpp_server, measured, endpoint):
    result = measured(llama_cpp_server, "--endpoint", endpoint, *FEW, "--output-tokens", 8, "--concurrency", 1)
    level = result["levels"][0]
    assert level["failures"] == {}
    assert len(level["samples"]["latency_s"]) == 6
    assert all(n <= 8 for n in level["samples"]["output_tokens"])
    # it sends no usage, so its word that it went on to the limit counts, or the tokenizer
    assert level["checks"]["usage_missing"] + level["checks"]["tokens_counted_by"].get("server", 0) == 6
    assert endpoint == "chat" or result["target"]["prompt_as"] == "text"
