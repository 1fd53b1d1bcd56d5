"""benchmark_server.py from end to end, against the server that answers at once."""

import subprocess
import sys

import pytest

from llama_engine.measure.result import load_result
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def null_url():
    command = [sys.executable, "-m", "llama_engine.serving.null_server"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


@pytest.fixture
def measured(run_script, null_url, tmp_path, monkeypatch):
    """Run it and return its result. It is as fast as its own null model, so INVALID, which is no error."""
    monkeypatch.setattr("llama_engine.measure.served.NULL_S", 0.2)

    def run(*flags):
        output = tmp_path / "served.json"
        where = ("--url", null_url, "--output", output, "--force", "--device", "cpu")
        done = run_script("benchmarks/benchmark_server.py", *where, *flags)
        assert done.returncode in (0, 1), done.stderr
        return load_result(output)

    return run


def test_a_trace_is_replayed_and_swept(measured, tmp_path):
    (tmp_path / "trace.csv").write_text("arrival,input,output\n0,8,3\n1,9,2\n2,16,4\n")
    workload = tmp_path / "w.json"
    workload.write_text('{"trace": "trace.csv"}')
    result = measured("--workload", workload, "--replay", 10, "--sweep", "--most", 1)
    assert [(x["mode"], x.get("concurrency")) for x in result["levels"]] == [("trace", None), ("closed", 1)]
    assert [x["failures"] for x in result["levels"]] == [{}, {}]
    assert [sorted(x["samples"]["output_tokens"]) for x in result["levels"]] == [[2, 3, 4]] * 2
    assert result["levels"][0]["rate"] == pytest.approx(3 / 0.2)
    assert result["workload"]["traffic"]["input_tokens"] == "as in trace.csv"
    assert "input_tokens" not in result["workload"]


def test_the_search_for_goodput_ends_at_the_most_it_may_try(measured):
    flags = ("--find-goodput", "concurrency", "--slo", "latency_ms:60000", "--most", 2, "--attainment", 0.5)
    result = measured(*flags, "--input-tokens", 8, "--output-tokens", 3, "--most-requests", 8)
    search = result["search"]
    assert (search["highest_met"], search["lowest_missed"]) == (2, None)
    assert [step["level"] for step in search["steps"]] == [0, 1]
    assert [x["concurrency"] for x in result["levels"]] == [1, 2]
    assert search["goodput"]["share"] == 1


def test_without_a_tokenizer_the_server_s_usage_says_how_long_prompts_were(measured):
    result = measured("--concurrency", 1, "--requests", 3, "--input-tokens", 12, "--output-tokens", 5)
    assert result["target"]["prompt_as"] == "text"
    assert result["workload"]["traffic"]["text"].startswith("estimated")
    level = result["levels"][0]
    assert level["samples"]["input_tokens"] == [1] * 3  # what the null server counts, whatever it gets
    assert level["checks"]["tokens_counted_by"] == {"server": 3}
    assert "tokenizer_disagrees" not in level["checks"]
    assert 0.3 < level["checks"]["null_responses_per_s"] / result["null_model"]["responses_per_s"] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--api", "triton"], "give --tokenizer"),
        (["--find-goodput"], "--find-goodput needs --slo"),
        (["--replay"], "--replay needs a workload with a trace"),
        (["--extra-body", "[1]"], "--extra-body takes a JSON object"),
        (["--tokenizer", "results"], "results has no tokenizer.json"),
        (["--slo", "mlperf-server", "ttft_ms:3"], "--slo takes ttft_ms:MS"),
        (["--attainment", "1.5", "--slo", "ttft_ms:3"], "--attainment must lie between 0 and 1"),
        (["--url", "localhost:80"], "--url: an OpenAI API is at http"),
    ],
)
def test_bad_flags_are_one_line(run_script, tmp_path, flags, message):
    output = tmp_path / "x.json"
    done = run_script("benchmarks/benchmark_server.py", "--url", "http://127.0.0.1:9", "--output", output, *flags)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not output.exists()
