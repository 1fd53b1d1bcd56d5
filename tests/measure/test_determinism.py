"""Answers that company changes are counted where they change, and nowhere else."""

import json

import pytest

from llama_engine.cpu.executor import HostExecutor
from llama_engine.measure import determinism
from llama_engine.measure.determinism import Answers, Questions
from llama_engine.native import load_engine

KINDS = ["again", "batch", "batch", "joining", "preempted", "prefix", "next_turn"]


@pytest.fixture
def engine(tiny_engine):
    return load_engine(tiny_engine, device="cpu", threads=1)


@pytest.fixture
def asked():
    windows = [[(37 * row + 11 * i) % 512 for i in range(48)] for row in range(6)]
    return Questions.of(windows, 24, (2, 4), None)


def by_kind(engine, asked):
    found = list(determinism.conditions(engine, asked))
    assert [condition["kind"] for condition in found] == KINDS
    return found


def test_the_engine_answers_as_it_does_alone(engine, asked):
    found = by_kind(engine, asked)
    assert [condition["changed"] for condition in found] == [0] * 7
    assert [condition["compared"] for condition in found[:4]] == [6] * 4
    assert all(condition["compared"] for condition in found)  # some were preempted, some found their prefix
    assert all(condition["output_tokens_per_s"] > 0 for condition in found)


def test_an_engine_that_minds_its_company_is_seen(engine, asked, monkeypatch):
    draw = HostExecutor._draw
    monkeypatch.setattr(
        HostExecutor, "_draw", lambda self, x, chunks: [(t + (len(chunks) > 1)) % 512 for t in draw(self, x, chunks)]
    )
    found = by_kind(engine, asked)
    assert [condition["changed"] > 0 for condition in found] == [False, True, True, True, True, False, False]
    assert found[1]["share"] == 1
    assert found[1]["first_difference_tokens"] == 0
    assert determinism.changed_in_company(found) >= 12


def test_shares_by_hand():
    alone, other = Answers([[1, 2], [3, 4], [5, 6]], []), Answers([[1, 2], [3, 9], [0, 6]], [], seconds=2.0)
    found = determinism.compared("batch", 3, alone, other)
    assert (found["compared"], found["changed"], found["share"]) == (3, 2, 2 / 3)
    assert found["first_difference_tokens"] == 0
    assert found["output_tokens_per_s"] == 3
    assert determinism.compared("preempted", 3, alone, other, [0])["changed"] == 0
    assert determinism.compared("preempted", 3, alone, other, [])["share"] is None


def test_the_price_is_that_of_the_fastest_which_company_does_not_change(asked, monkeypatch):
    speed = {"auto": 12.0, "streaming": 10.0, "tiled": 5.0}
    monkeypatch.setattr(
        determinism, "answer", lambda name, few, n: Answers([[0] * 10] * n, [], seconds=10 * n / speed[name])
    )
    changed = [{"conditions": [{"kind": "batch", "changed": n}]} for n in (3, 0, 0)]
    found = determinism.price(dict(zip(speed, speed)), changed, asked, 5)
    assert found["status"] == "measured"
    assert [load["concurrency"] for load in found["loads"]] == [1, 2, 4]
    assert {load["invariant"] for load in found["loads"]} == {"streaming"}
    assert all(load["ratio"] == pytest.approx(1.2) for load in found["loads"])
    still = [{"conditions": [{"kind": "preempted", "changed": 1}]}]
    assert determinism.price({"auto": "auto"}, still, asked, 5)["status"] == "nil"
    assert determinism.price({"auto": "auto"}, changed, asked, 5)["status"] == "unknown"


def test_the_script(run_script, tiny_model, tiny_engine, tmp_path):
    common = ("--model-dir", tiny_model, "--engine-dir", tiny_engine, "--device", "cpu", "--threads", 1)
    few = ("--prompts", 4, "--input-tokens", 40, "--output-tokens", 20, "--runs", 2, "--output", tmp_path / "d.json")
    done = run_script("benchmarks/benchmark_determinism.py", *common, *few, "--temperature", 0.8)
    assert done.returncode == 0, done.stderr
    assert "price of batch invariance for kernels auto: nil" in done.stdout
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["workload"]["batch"] == [4]
    assert found["workload"]["sampling"]["temperature"] == 0.8
    assert [x["changed"] for x in found["variants"][0]["conditions"]] == [0] * 6
    assert [len(load["output_tokens_per_s"]["auto"]) for load in found["price"]["loads"]] == [2, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", 9], "--batch 9: this engine and --prompts leave room for 1 to 4"),
        (["--prompts", 0], "--prompts must be at least 1"),
        (["--output-tokens", 999], "exceed this engine's max_seq_len 256"),
        (["--kernels", "streaming"], "kernels must be one of auto, torch on cpu"),
        (["--temperature", -1], "temperature"),
    ],
)
def test_bad_input_is_one_line(run_script, tiny_model, tiny_engine, tmp_path, flags, message):
    common = ("--model-dir", tiny_model, "--engine-dir", tiny_engine, "--device", "cpu", "--input-tokens", 40)
    common += ("--output-tokens", 20)
    done = run_script("benchmarks/benchmark_determinism.py", *common, "--output", tmp_path / "x.json", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
