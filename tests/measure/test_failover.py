"""The failover benchmark: what it counts, and one run of it through a gateway, with one of two servers killed."""

import itertools
import json
import re
import sys

import pytest

from llama_engine.measure import failover, validity
from llama_engine.measure.failover import Answer, Phase, some_requests
from llama_engine.measure.generation import GenerationRun
from llama_engine.measure.result import load_result


def phase(*answers, end=10.0):
    """Of (number, ids, error), (..., times) or (..., times, resumed_after)."""
    made = []
    for number, ids, error, *more in answers:
        times, resumed = [*more, None, None][:2]
        made.append(Answer(number, GenerationRun(0.0, times or [1.0] * len(ids), ids), error, resumed))
    return Phase(0.0, end, made)


def test_requests_are_seeded_distinct_and_half_sampled():
    some = some_requests(8, 5, 9, 512, seed=1)
    assert some == some_requests(8, 5, 9, 512, seed=1) != some_requests(8, 5, 9, 512, seed=2)
    assert len({tuple(request.ids) for request in some}) == 8
    assert [bool(request.sampling) for request in some] == [False, True] * 4
    assert {(len(request.ids), request.new_tokens) for request in some} == {(5, 9)}


def test_every_answer_is_compared_with_what_was_right_before():
    calm = phase((0, [1, 2], None), (1, [3, 4], None), (1, [3, 4], None), (2, [5, 6], None), (2, [5, 7], None))
    right, unstable = failover.right_answers(calm)
    assert (right, unstable) == ({0: [1, 2], 1: [3, 4]}, 1)
    seen = phase(
        (0, [1, 2], None), (0, [1, 2, 2], None), (0, [2, 1], None), (1, [3], None), (1, [3], "gone"), (2, [5, 9], None)
    )
    assert failover.compare(seen, right, 2) == {"answers": 6, "lost": 2, "duplicated": 1, "wrong": 1, "diverged": 0}


@pytest.mark.parametrize(
    ("ids", "made", "kind"),
    [
        ([1, 2, 9], 2, "diverged"),
        ([1, 9, 3], 2, "wrong"),  # before it was moved
        ([1, 2, 9], None, "wrong"),  # it was not, or had not begun
        ([1, 2, 3], 2, None),
    ],
)
def test_what_a_moved_answer_says_after_the_move_is_told_from_what_it_said_before(ids, made, kind):
    seen = failover.compare(phase((0, ids, None, None, made)), {0: [1, 2, 3]}, 3)
    assert [name for name in ("lost", "duplicated", "wrong", "diverged") if seen[name]] == ([kind] if kind else [])


def test_a_dip_and_its_end_are_measured_from_the_kill():
    """100 tokens a second until 4 s, none until 6 s, 50 until 8 s, then 100; one user waits from 3.9 to 6.2 s."""
    times = [i / 100 for i in range(1, 400)] + [6 + i / 50 for i in range(100)] + [8 + i / 100 for i in range(200)]
    one = phase((0, [0] * len(times), None, times), (1, [0, 0], None, [3.9, 6.2]))
    found = failover.disturbance(one, 4.0, 9.0, 10.0)
    assert found["before_tokens_per_s"] == pytest.approx(100, rel=0.02)
    assert found["lowest_tokens_per_s"] == 0
    assert found["longest_gap_s"] == pytest.approx(2.3)
    assert found["usual_gap_s"] == pytest.approx(3.9)
    assert found["recovery_s"] == pytest.approx(3.6, abs=0.3)  # 90 % over two seconds from there on
    assert found["full_strength_s"] == 5.0
    assert [x["s"] for x in found["timeline"][:2]] == [-4.0, -3.5]
    assert failover.disturbance(one, 4.0, None, 6.0)["recovery_s"] is None


@pytest.mark.parametrize(
    ("checks", "reason"),
    [
        ({"failed_requests": 1}, "1 requests failed, most with 'no room'"),
        ({"lost_answers": 1}, "1 lost answers"),
        ({"duplicated_answers": 2}, "2 duplicated answers"),
        ({"wrong_answers": 3}, "3 wrong answers"),
        ({"moved_requests": 0}, "nothing was tried"),
    ],
)
def test_a_single_bad_answer_makes_the_run_invalid(checks, reason):
    counted = ("failed_requests", "lost_answers", "duplicated_answers", "wrong_answers")
    good = dict.fromkeys(counted, 0) | {"moved_requests": 4}
    assert validity.judge({"checks": good})["status"] == "VALID"
    failures = failover.failures(
        [phase((0, [], "no room"), (0, [], "no room")), phase((1, [], "gone"), (1, [3], None))]
    )
    verdict = validity.judge({"checks": good | checks, "failures": failures})
    assert verdict["status"] == "INVALID"
    assert reason in verdict["reasons"][0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the wheel is for Linux")
@pytest.mark.parametrize("layout", [(), ("--instances", 2)], ids=["two servers", "two instances in one server"])
def test_a_run_through_a_gateway(layout, worded_engine, run_script, tmp_path):
    output = tmp_path / "failover.json"
    flags = ("--engine-dir", worded_engine, "--device", "cpu", "--output-tokens", 200, "--duration", 3, *layout)
    done = run_script("benchmarks/benchmark_failover.py", *flags, "--output", output)
    result = load_result(output)
    # A busy machine may lag. Where one server has all engines, nobody is left to answer while it starts.
    expected = ("lagged", "lost answers") if layout else ("lagged",)
    assert not [reason for reason in result["validity"]["reasons"] if not any(what in reason for what in expected)]
    assert all("none of 1 replicas is up" in message for message in result["failures"])
    assert done.returncode == (result["validity"]["status"] != "VALID")
    seen = result["failover"]
    assert seen["answers"] >= 32
    counted = ("duplicated", "wrong", "diverged", "requests_without_one_right_answer")
    assert {seen[name] for name in counted} == {0}
    assert seen["lost"] == 0 or layout
    assert seen["full_strength_s"] > 0
    assert result["checks"]["moved_requests"] == seen["moved"] >= max(1, seen["resumed"])
    assert all(a["s"] < b["s"] for a, b in itertools.pairwise(seen["timeline"]))
    assert f"{seen['answers']} answers: {seen['lost']} lost, 0 duplicated, 0 wrong" in done.stdout
    assert json.loads(output.read_text())["workload"]["replicas"] == 2
    assert ("ratio" in result["scaling"][0]) == (not layout)


@pytest.mark.slow
def test_what_a_gateway_carries_without_engines(worded_engine, run_script):
    flags = ("--users", 12, "--interval", 4, "--output-tokens", 10, "--duration", 1, "--gateways", 2)
    done = run_script("benchmarks/benchmark_gateway.py", "--engine-dir", worded_engine, *flags)
    (line,) = done.stdout.splitlines()
    responses, tokens = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:responses|tokens)/s", line))
    assert tokens > responses * 3  # 4, 4 and 2
    assert re.search(r"2 gateways: 0\.\d\d of a core each, [1-9]\d* us a response", line)


def test_what_cannot_be_tried_is_refused(tiny_engine, run_script):
    script = ("benchmarks/benchmark_failover.py", "--engine-dir", tiny_engine, "--device", "cpu")
    for flags, why in (
        (("--replicas", 1), "--replicas must be at least 2"),
        (("--gateways", 0), "--gateways must be at least 1"),
        ((), "has no tokenizer, which the gateway needs"),
    ):
        refused = run_script(*script, *flags)
        assert refused.returncode == 2
        assert why in refused.stderr
