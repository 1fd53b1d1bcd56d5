from pathlib import Path

import pytest

from llama_engine.measure import definitions

# one request: 11 tokens, first after 100 ms, last after 600 ms
SAMPLES = {
    "ttft_ms": [100.0],
    "tpot_ms": [50.0],
    "latency_s": [0.6],
    "output_tokens": [11],
    "itl_ms": [40.0] * 9 + [140.0],
}


def values(tool):
    return {name: figures["mean"] for name, _, figures in definitions.table(tool, SAMPLES)}


def test_the_same_word_means_different_things():
    assert values("ours")["TPOT, ms"] == values("vllm")["TPOT, ms"] == pytest.approx(50)
    assert values("guidellm")["TPOT, ms"] == pytest.approx(600 / 11)
    assert values("guidellm")["ITL, ms"] == pytest.approx(50)
    assert values("aiperf")["inter token latency, ms"] == pytest.approx(50)
    assert values("aiperf")["output token throughput per user"] == pytest.approx(20)
    assert values("trtllm-bench")["generation throughput, tok/s"] == pytest.approx(20)
    ours = {name: figures for name, _, figures in definitions.table("ours", SAMPLES)}
    assert ours["ITL, ms"]["p99"] > 100


def test_percentiles_of_trtllm_bench_do_not_interpolate():
    assert definitions.nearest_rank([1, 2, 3, 4], 50) == 3
    assert definitions.nearest_rank([1, 2], 99) == 2


@pytest.mark.parametrize("tool", definitions.DEFINITIONS)
def test_every_tool_is_in_the_documentation(tool):
    text = (Path(__file__).parents[2] / "docs" / "METRICS.md").read_text().lower()
    assert (tool if tool != "ours" else "here") in text
