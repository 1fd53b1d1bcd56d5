import json
import shutil

import pytest

from llama_engine.measure.compare import judge_again, unlike
from llama_engine.measure.result import load_folder
from tests.results import ENVIRONMENT, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "old")


def test_compare_results(folder, run_script, edit_json, tmp_path):
    new = tmp_path / "new"
    shutil.copytree(folder, new)
    compare = ("scripts/compare_results.py", folder, new)
    assert run_script(*compare).returncode == 0
    slow = json.loads((new / "baseline.json").read_text())["samples"] | {"latency_s": [1.1] * 5}
    edit_json(new / "baseline.json", {"samples": slow})
    done = run_script(*compare)
    assert done.returncode == 3
    assert "REGRESSION" in done.stdout
    assert run_script(*compare, "--tolerance", "0.2").returncode == 0
    edit_json(new / "baseline.json", {"environment": ENVIRONMENT | {"fingerprint": "0" * 16}})
    assert run_script(*compare).returncode == 4
    forced = run_script(*compare, "--force")
    assert forced.returncode == 3
    assert "DIFFERENT MACHINES" in forced.stdout
    edit_json(new / "baseline.json", {"validity": {"status": "INVALID", "reasons": ["x"]}})
    assert run_script(*compare, "--force").returncode == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"validity": {"status": "INVALID", "reasons": ["clocks were throttled"]}}, "INVALID: clocks were throttled"),
        ({"workload": {"input_tokens": 4, "output_tokens": 9}}, "workload.output_tokens is 8 and 9"),
    ],
)
def test_compare_leaves_out_levels_that_cannot_be_compared(folder, run_script, edit_json, tmp_path, change, reason):
    new = tmp_path / "new"
    level = {"workload": {"input_tokens": 4, "output_tokens": 8}, "samples": {"latency_s": [1.0] * 5}, "concurrency": 2}
    level |= {"summary": {}, "validity": {"status": "VALID", "reasons": []}}
    edit_json(folder / "optimized-native.json", {"levels": [level]})
    shutil.copytree(folder, new)
    slow = level | {"samples": {"latency_s": [2.0] * 5}}
    edit_json(new / "optimized-native.json", {"levels": [slow]})
    assert run_script("scripts/compare_results.py", folder, new).returncode == 3
    sampled = slow | {"workload": level["workload"] | {"sampling": {"temperature": 0.8}}}
    edit_json(new / "optimized-native.json", {"levels": [level, sampled]})
    assert run_script("scripts/compare_results.py", folder, new).returncode == 0
    edit_json(new / "optimized-native.json", {"levels": [slow | change]})
    done = run_script("scripts/compare_results.py", folder, new)
    assert done.returncode == 0
    assert "left out: optimized-native, 2 at once:" in done.stdout
    assert reason in " ".join(done.stdout.split())


def test_one_gpu_is_not_compared_with_two_in_silence():
    two = {"engine": {"config": {"tp_size": 2}}}
    assert list(unlike({"engine": {"config": {}}}, two)) == ["the engines run on 1 and 2 GPUs"]
    assert not list(unlike(two, two))


def test_a_pair_that_is_judged_again_gets_its_ratios_or_loses_them(folder):
    results = load_folder(folder)
    assert judge_again(results) == []
    ratios = results["comparison"]["speedup"]
    results["baseline"]["checks"] = {"failed_requests": 1}
    assert judge_again(results) == ["baseline", "comparison"]
    assert results["comparison"]["speedup"] == {}
    assert results["comparison"]["validity"]["reasons"] == ["baseline: 1 requests failed"]
    results["baseline"]["checks"] = {}
    assert judge_again(results) == ["baseline", "comparison"]
    assert results["comparison"]["speedup"].keys() == ratios.keys()
    assert results["comparison"]["speedup"]["latency"] == ratios["latency"]
