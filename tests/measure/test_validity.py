"""Each rule passes a sound run and fails the one it exists for."""

import pytest

from llama_engine.measure import validity

GPU = {"name": "a card", "power_limit_w": 300.0, "default_power_limit_w": 300.0, "max_sm_clock_mhz": 1980}


def sound():
    return {
        "backend": "native",
        "workload": {"output_tokens": 4, "concurrency": 2},
        "samples": {"latency_s": [1.0, 1.01, 1.02, 0.99, 1.0], "output_tokens": [4] * 5},
        "checks": {"failed_requests": 0, "clock_backwards": 0, "requests_per_s": 2.0, "mean_latency_s": 1.0},
        "telemetry": {
            "throttle_share": {"sw_power_cap": 0.01},
            "gpu_sm_clock_mhz": {"mean": 1900.0, "min": 1700.0, "max": 1980.0, "drift": 0.01},
            "other_processes": 0,
        },
        "environment": {"gpu": GPU},
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
} | {name: ("telemetry", {"throttle_share": {name: 0.5}}, f"throttled ({name})") for name in validity.SLOWDOWNS}
BROKEN["drift"] = (
    "telemetry",
    {"gpu_sm_clock_mhz": sound()["telemetry"]["gpu_sm_clock_mhz"] | {"drift": 0.06}},
    "by 6%",
)


def capped(gpu, **telemetry):
    """What ``judge`` says of a run that was at its power limit in a fifth of samples, and of the same as a level."""
    telemetry = sound()["telemetry"] | {"throttle_share": {"sw_power_cap": 0.2}} | telemetry
    level = {"telemetry": telemetry}
    verdict = validity.judge(sound() | {"telemetry": telemetry, "environment": {"gpu": gpu}, "levels": [level]})
    assert level["validity"] == verdict
    return verdict


def test_a_card_at_its_own_power_limit_is_a_caution_with_its_clocks():
    verdict = capped(GPU)
    assert verdict["status"] == "VALID"
    assert verdict["cautions"] == [
        "at the card's default power limit of 300 W in 20% of samples: mean SM clock 1,900 of 1,980 MHz"
    ]


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (GPU | {"power_limit_w": 250.0}, "at a limit of 250 W, the card's default is 300 W"),
        (GPU | {"power_limit_w": 350.0}, "at a limit of 350 W, the card's default is 300 W"),
        (GPU | {"default_power_limit_w": None}, "at a limit of 300 W, the card's default is unknown"),
        (None, "at a limit of unknown"),
    ],
)
def test_another_power_limit_that_was_met_is_invalid(gpu, message):
    verdict = capped(gpu)
    assert verdict["status"] == "INVALID"
    assert message in verdict["reasons"][0]


def test_older_results_are_judged_by_data_sheet_and_by_their_whole_range_of_clocks():
    old = {"name": "NVIDIA H100 80GB HBM3", "power_limit_w": 700.0, "max_sm_clock_mhz": 1980}
    near, far = ({"mean": 1950.0, "max": 1980.0, "min": low} for low in (1920.0, 1755.0))
    assert capped(old, gpu_sm_clock_mhz=near)["status"] == "VALID"
    assert capped(old | {"power_limit_w": 500.0}, gpu_sm_clock_mhz=near)["status"] == "INVALID"
    assert "drifted by 12%" in capped(old, gpu_sm_clock_mhz=far)["reasons"][0]


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
    assert good["validity"] == {"status": "VALID", "reasons": [], "cautions": []}
    assert validity.judge(sound() | {"levels": [bad]})["status"] == "VALID"  # its own samples are sound
    verdict = validity.judge(sound() | {"samples": {}, "levels": [bad]})
    assert verdict["status"] == "INVALID"
    assert any(reason.startswith("concurrency 2: ") and message in reason for reason in verdict["reasons"])


def test_little_by_hand():
    assert validity.little_gap(8, 4.0, 2.0) == 0
    assert validity.little_gap(8, 4.0, 1.0) == 0.5
