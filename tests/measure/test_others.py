"""Other tools' files, read as results of ours.

``others/guidellm.json`` and ``others/aiperf/`` were written by GuideLLM 0.8.1 and aiperf 0.13.0, which loaded this
repository's gateway with two users on a busy machine; fields that nothing here reads are cut. The result of ``vllm
bench serve`` below has the shape that vLLM's sources give it; no run of it was at hand.
"""

import json
import shutil
from pathlib import Path

import pytest

from llama_engine.errors import InputError
from llama_engine.measure import others

OTHERS = Path(__file__).parent / "others"
VLLM = {
    "date": "20260101-000000", "endpoint_type": "openai", "backend": "openai", "label": None, "model_id": "m",
    "tokenizer_id": "m", "num_prompts": 6, "request_rate": "inf", "burstiness": 1.0, "max_concurrency": 2,
    "duration": 3.0, "completed": 6, "failed": 0, "total_input_tokens": 24, "total_output_tokens": 18,
    "request_throughput": 2.0, "request_goodput": None, "output_throughput": 6.0, "total_token_throughput": 14.0,
    "input_lens": [4] * 6, "output_lens": [3] * 6, "ttfts": [0.4] * 6, "itls": [[0.2, 0.4]] * 6,
    "start_times": [10.0, 10.0, 11.0, 11.0, 12.0, 12.0], "generated_texts": ["a b c"] * 6, "errors": [""] * 6,
    "max_output_tokens_per_s": 6.0, "max_concurrent_requests": 2, "mean_ttft_ms": 400.0, "median_ttft_ms": 400.0,
    "p99_ttft_ms": 400.0, "mean_tpot_ms": 300.0, "median_tpot_ms": 300.0, "p99_tpot_ms": 300.0,
}  # fmt: skip
DETAILED = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors")


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def only(result):
    (level,) = result["levels"]
    return level


def test_vllm_bench_by_hand(tmp_path):
    level = only(others.read(write(tmp_path / "v.json", VLLM)))
    assert level["samples"]["latency_s"] == pytest.approx([1.0] * 6)
    assert level["samples"]["tpot_ms"] == pytest.approx([300.0] * 6)
    assert level["summary"]["itl_ms"]["max"] == pytest.approx(400)
    assert level["summary"]["output_tokens_per_s"]["p50"] == pytest.approx(18 / 3)
    assert level["checks"]["requests_per_s"] == pytest.approx(2)
    assert level["validity"]["status"] == "VALID"
    (caution,) = level["validity"]["cautions"]
    assert "client ceiling, client lag, prefix-cache hits" in caution
    assert "Little" not in caution


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"failed": 1}, "1 requests failed"),
        ({"max_concurrency": 3}, "Little's law is off by 33%"),
        ({"itls": [[0.6, -0.1]] * 6}, "the clock went backwards 6 times"),
    ],
)
def test_our_rules_void_a_run_of_theirs(tmp_path, change, reason):
    level = only(others.read(write(tmp_path / "v.json", VLLM | change)))
    assert level["validity"]["status"] == "INVALID"
    assert any(reason in x for x in level["validity"]["reasons"])


def test_without_records_the_tools_own_percentiles_are_all(tmp_path):
    short = {key: value for key, value in VLLM.items() if key not in DETAILED}
    level = only(others.read(write(tmp_path / "v.json", short)))
    assert level["samples"] == {}
    assert level["summary"]["tpot_ms"] == {"p50": 300.0, "p99": 300.0, "mean": 300.0}
    assert "Little's law" in level["validity"]["cautions"][0]


def test_guidellms_tpot_is_computed_again_without_the_ttft():
    level = only(others.read(OTHERS / "guidellm.json"))
    first = json.loads((OTHERS / "guidellm.json").read_text())["benchmarks"][0]["requests"]["successful"][0]
    times = first["info"]["timings"]
    decode = (times["last_token_iteration"] - times["first_token_iteration"]) / 23 * 1e3
    assert level["samples"]["tpot_ms"][0] == pytest.approx(decode)
    assert decode == pytest.approx(first["inter_token_latency_ms"])
    assert level["said"]["time_per_output_token_ms"] > level["summary"]["tpot_ms"]["p50"]
    assert level["samples"]["ttft_ms"][0] == pytest.approx(first["time_to_first_token_ms"])
    assert level["workload"]["output_tokens"] == 24
    assert level["concurrency"] == 2
    assert any("client lagged" in reason for reason in level["validity"]["reasons"])


def test_aiperfs_inter_token_latency_is_our_tpot():
    level = only(others.read(OTHERS / "aiperf"))
    assert level["summary"]["tpot_ms"]["p50"] == pytest.approx(level["said"]["inter_token_latency_ms"], rel=1e-3)
    assert level["summary"]["itl_ms"]["p50"] < level["summary"]["tpot_ms"]["p50"]  # chunks hold several tokens
    assert level["samples"]["output_tokens"] == [24] * 8
    assert level == only(others.read(OTHERS / "aiperf" / "profile_export.jsonl"))


def test_in_an_open_loop_times_count_from_the_due_time(tmp_path):
    shutil.copytree(OTHERS / "aiperf", tmp_path / "run")
    told = json.loads((tmp_path / "run" / others.AIPERF_SUMMARY).read_text())
    told["input_config"]["phases"] = [{"kind": "profiling", "type": "poisson", "rate": 3.0}]
    write(tmp_path / "run" / others.AIPERF_SUMMARY, told)
    closed, late = (only(others.read(folder))["samples"]["ttft_ms"] for folder in (OTHERS / "aiperf", tmp_path / "run"))
    records = [json.loads(line) for line in (OTHERS / "aiperf" / others.AIPERF_RECORDS).read_text().splitlines()]
    lags = [(x["metadata"]["request_start_ns"] - x["metadata"]["credit_issued_ns"]) / 1e6 for x in records]
    assert late == pytest.approx([a + b for a, b in zip(closed, lags)])


def test_the_script_judges_one_and_compares_two(run_script, tmp_path):
    old = write(tmp_path / "old.json", VLLM)
    done = run_script("scripts/compare_results.py", old)
    assert done.returncode == 0, done.stderr
    assert "VALID: by the rules that could be applied" in done.stdout
    slow = write(tmp_path / "new.json", VLLM | {"itls": [[0.25, 0.41]] * 6, "max_concurrency": 2})
    done = run_script("scripts/compare_results.py", old, slow)
    assert done.returncode == 3, done.stdout
    assert "2 at once tpot_ms" in done.stdout
    assert run_script("scripts/compare_results.py", OTHERS / "aiperf").returncode == 1
    assert run_script("scripts/compare_results.py", OTHERS / "aiperf", OTHERS / "guidellm.json").returncode == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"a": 1}', "no output of aiperf, guidellm or vllm bench serve"),
        ('{"benchmarks": [{}]}', "not as guidellm writes it: KeyError: 'config'"),
        ('{"completed": 1, "duration": 1, "output_throughput": 1, "ttfts": [1]}', "not as vllm-bench writes it"),
        ("[]", "no output of"),
    ],
)
def test_what_is_not_theirs_is_refused_in_one_line(run_script, tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message.split("(")[0]):
        others.read(path)
    done = run_script("scripts/compare_results.py", path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_path_is_one_line(run_script):
    done = run_script("scripts/compare_results.py", "nowhere")
    assert done.returncode == 2
    assert done.stderr == "error: nowhere does not exist\n"
