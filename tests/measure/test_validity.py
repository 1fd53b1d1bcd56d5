"""Each rule passes a sound run and fails the one it exists for."""

import pytest

from llama_engine.measure import validity


def sound():
    return {
        "backend": "native",
        "workload": {"output_tokens": 4, "concurrency": 2},
        "samples": {"latency_s": [1.0, 1.01, 1.02, 0.99, 1.0], "output_tokens": [4] * 5},
        "checks": {"failed_requests": 0, "clock_backwards": 0, "requests_per_s": 2.0, "mean_latency_s": 1.0},
        "telemetry": {"throttle_share": {"sw_power_cap": 0.01}, "other_processes": 0},
    }


def test_a_sound_run_is_valid():
    assert validity.judge(sound()) == {"status": "VALID", "reasons": [], "cautions": []}


def test_spread_is_a_caution_that_intervals_answer():
    noisy = sound() | {"samples": {"latency_s": [1, 2, 3, 4, 5]}}
    verdict = validity.judge(noisy)
    assert verdict["status"] == "VALID"
    assert "spread (p75 - p25) / p50 is 67%" in verdict["cautions"][0]


BROKEN = {
    "too few runs": ("samples", {"latency_s": [1.0], "output_tokens": [4]}, "timed runs"),
    "length": ("samples", {"latency_s": [1.0] * 5, "output_tokens": [4, 4, 4, 4, 3]}, "1 outputs are not 4"),
    "failed": ("checks", {"failed_requests": 1}, "1 requests failed"),
    "prefix cache": ("checks", {"prefix_cache_hit_tokens": 64}, "64 prompt tokens came from a prefix cache"),
    "repeats itself": ("checks", {"distinct_outputs": 2}, "gave 2 different outputs"),
    "clock": ("checks", {"clock_backwards": 1}, "clock went backwards"),
    "lag": ("checks", {"client_lag_p99_ms": 6.0}, "client lagged 6.0 ms"),
    "Little": ("checks", {"requests_per_s": 1.0, "mean_latency_s": 1.0}, "Little's law is off by 50%"),
    "other process": ("telemetry", {"other_processes": 1}, "other processes"),
} | {name: ("telemetry", {"throttle_share": {name: 0.5}}, f"throttled ({name})") for name in validity.THROTTLE_REASONS}


@pytest.mark.parametrize(("key", "value", "message"), BROKEN.values(), ids=BROKEN)
def test_each_rule_can_fail(key, value, message):
    verdict = validity.judge(sound() | {key: value})
    assert verdict["status"] == "INVALID"
    assert [reason for reason in verdict["reasons"] if message in reason], verdict


def test_a_prefix_cache_that_was_asked_for_may_be_hit():
    result = sound() | {"checks": {"prefix_cache_hit_tokens": 64}}
    assert validity.judge(result)["status"] == "INVALID"
    asked = result["workload"] | {"prefix_cache": True}
    assert validity.judge(result | {"workload": asked})["status"] == "VALID"


def test_the_baseline_need_not_repeat_itself():
    result = sound() | {"checks": {"distinct_outputs": 3}}
    assert validity.judge(result)["status"] == "INVALID"
    assert validity.judge(result | {"backend": "transformers"})["status"] == "VALID"


@pytest.mark.parametrize(("key", "value", "message"), list(BROKEN.values())[1:], ids=list(BROKEN)[1:])
def test_rules_reach_every_level_and_leave_the_others_standing(key, value, message):
    good = {k: v for k, v in sound().items() if k != "workload"} | {"concurrency": 2}
    bad = good | {key: value}
    assert validity.judge(sound() | {"levels": [bad, good]})["status"] == "VALID"
    assert bad["validity"]["status"] == "INVALID"
    assert any(message in reason for reason in bad["validity"]["reasons"])
    assert good["validity"] == {"status": "VALID", "reasons": []}
    assert validity.judge(sound() | {"levels": [bad]})["status"] == "VALID"  # its own samples are sound
    verdict = validity.judge(sound() | {"samples": {}, "levels": [bad]})
    assert verdict["status"] == "INVALID"
    assert any(reason.startswith("concurrency 2: ") and message in reason for reason in verdict["reasons"])


def test_little_by_hand():
    assert validity.little_gap(8, 4.0, 2.0) == 0
    assert validity.little_gap(8, 4.0, 1.0) == 0.5
