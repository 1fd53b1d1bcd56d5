"""Who plays when, on which prompts, and what the ratios say; the script itself over two engines of its own."""

import asyncio

import pytest

from llama_engine.errors import RunError
from llama_engine.measure.answers import ServedRun
from llama_engine.measure.contestants import Cell, Contestant, batch
from llama_engine.measure.lengths import Length
from llama_engine.measure.load import Load
from llama_engine.measure.result import load_result, validate
from llama_engine.measure.stack_worker import StackProcess
from llama_engine.measure.text import RandomIds, Text
from llama_engine.measure.tournament import METRICS, Tournament, play, ratios
from llama_engine.measure.traffic import Traffic
from tests.results import ENVIRONMENT

MODEL = {"name": "m", "source": "synthetic", "sha256": "a" * 64}


class Player(Contestant):
    """Makes a token each ``gap`` seconds, as it says, and remembers what it was asked."""

    kind, memory = "native", "shared"

    def __init__(self, name, gap, log, most=99, fails=0, breaks=""):
        self.name, self.gap, self.log, self.most, self.fails, self.breaks = name, gap, log, most, fails, breaks
        self.got = {}

    async def start(self):
        self.log.append(("start", self.name))

    async def stop(self):
        self.log.append(("stop", self.name))

    async def play(self, cell, text, seed):
        asks = batch(cell, text, seed)
        self.log.append((self.name, cell.traffic.name))
        if cell.traffic.name == self.breaks:
            raise RunError("out of memory")
        self.got.setdefault(seed, []).append([ask.ids for ask in asks])
        gap = self.gap * (1 + seed % 7 / 100)  # a drift that hits whoever plays that round
        load = Load(sent=len(asks))
        load.failures.update(["gone"] * self.fails)
        for ask in asks:
            load.prefixes["shared_tokens"] += self.prefixes.add(ask.ids)
            load.prefixes["prompt_tokens"] += len(ask.ids)
            load.runs.append(ServedRun(0.0, [gap * (i + 1) for i in range(ask.new_tokens)], input_tokens=len(ask.ids)))
        return load

    def describe(self):
        return super().describe() | {"about": {}}


def contest(players, cells, **options):
    options = {"rounds": 5, "swapped": False} | options
    tournament = Tournament(players, cells, text_of=lambda: Text(RandomIds(512)), **options)

    async def null(_):
        return None

    async def run():
        return await play(tournament, ENVIRONMENT, MODEL, prefix_cache=False, null=null, own_processes=1)

    return asyncio.run(run())


SHORT = Traffic("short", Length(8, 8), Length(4, 4))
LONG = Traffic("long", Length(48, 48), Length(2, 2))


def test_all_play_in_turn_on_the_same_prompts_and_ratios_are_paired():
    log = []
    players = [Player("a", 0.1, log), Player("b", 0.05, log), Player("c", 0.2, log)]
    result = contest(players, [Cell(SHORT, 2)])
    validate(result)
    assert log[3:-3] == [("a", "short"), ("b", "short"), ("c", "short")] * 6  # the first of each is not counted
    assert players[0].got == players[1].got == players[2].got
    prompts = [prompt for asked in players[0].got.values() for one in asked for prompt in one]
    assert len({tuple(prompt) for prompt in prompts}) == 12
    assert [x["summary"]["output_tokens_per_s"]["count"] for x in result["levels"]] == [5, 5, 5]
    assert all(x["samples"]["output_tokens"] == [4] * 10 for x in result["levels"])
    found = {(x["contestant"], x["metric"]): x for x in result["ratios"]}
    assert {name for name, _ in found} == {"b", "c"}
    for metric in ("output_tokens_per_s", "ttft", "tpot", "latency"):
        assert found["b", metric]["ci95"] == pytest.approx([2, 2])  # the drift cancels
        assert found["c", metric]["verdict"] == "slower"


def test_swapped_stacks_are_loaded_one_at_a_time():
    log = []
    contest([Player("a", 0.1, log), Player("b", 0.1, log)], [Cell(SHORT, 1), Cell(LONG, 1)], swapped=True)
    loaded = set()
    for what, name in log[:-2]:
        if what in ("start", "stop"):
            loaded ^= {name}
        else:
            assert loaded == {what}
    visit = [("a", "short")] * 2 + [("a", "long")] * 2
    assert log[1:5] == visit  # one to warm up, one that counts
    assert log.count(("a", "short")) == 10


def test_no_load_begins_after_its_time_and_those_left_are_named():
    log = []
    players = [Player("a", 0.1, log), Player("b", 0.1, log)]
    result = contest(players, [Cell(SHORT, 1), Cell(LONG, 1)], most_s=1e-9)
    assert result["workload"]["left_out"] == ["short, 1 at once", "long, 1 at once"]
    assert log == [("start", "a"), ("start", "b"), ("stop", "a"), ("stop", "b")]
    assert "left_out" not in contest(players, [Cell(SHORT, 1)], most_s=600)["workload"]


def test_an_invalid_load_and_a_crowded_one_enter_no_ratio():
    log = []
    players = [Player("a", 0.1, log), Player("b", 0.1, log, fails=1), Player("c", 0.1, log, most=2)]
    result = contest(players, [Cell(SHORT, 2), Cell(SHORT, 4)])
    assert {(x["contestant"], x["concurrency"]) for x in result["ratios"]} == {("c", 2)}
    assert [x["concurrency"] for x in result["levels"] if x["contestant"] == "c"] == [2]
    few = contest([Player("a", 0.1, log), Player("b", 0.1, log)], [Cell(SHORT, 1)], rounds=3)
    assert few["ratios"] == []
    assert "3 timed rounds" in few["levels"][0]["validity"]["reasons"][0]
    assert few["validity"]["status"] == "INVALID"


def test_who_breaks_down_leaves_and_the_others_play_on():
    log = []
    players = [Player("a", 0.1, log), Player("b", 0.1, log, breaks="long"), Player("c", 0.1, log)]
    result = contest(players, [Cell(SHORT, 1), Cell(LONG, 1)])
    assert [x.get("failed") for x in result["contestants"]] == [None, "long, 1 at once: out of memory", None]
    assert log.count(("b", "long")) == 1
    assert {(x["contestant"], x["workload"]) for x in result["ratios"]} == {
        ("b", "short"),
        ("c", "short"),
        ("c", "long"),
    }


def test_shared_prefixes_are_primed_and_say_so():
    traffic = Traffic("alike", Length(8, 8), Length(2, 2), prefix_groups=1, prefix_tokens=32)
    result = contest([Player("a", 0.1, []), Player("b", 0.1, [])], [Cell(traffic, 3)])
    said = result["levels"][0]["workload"]["traffic"]
    assert said["prefix_cache_can_help"]
    assert said["shared_prompt_share"] == 32 / 40


def test_ratios_need_the_same_place():
    part = {"validity": {"status": "VALID"}, "rounds": {name: [1.0] for name in METRICS}}
    here, there = ({"workload": {"traffic": {"name": name}}, "concurrency": 1} for name in "xy")
    assert ratios([part | here | {"contestant": "a"}, part | there | {"contestant": "b"}], "a") == []


def test_the_script_over_two_engines_of_its_own(run_script, tiny_engine, tiny_model, tmp_path, edit_json):
    workload, output = tmp_path / "w.json", tmp_path / "t.json"
    workload.write_text('{"input_tokens": 8, "output_tokens": "2:5", "prefix_groups": 1, "prefix_tokens": 32}')
    stacks = ["--stack", f"one=native:{tiny_engine}", "--stack", f"two=native:{tiny_engine},kernels=torch"]
    command = [
        "benchmarks/tournament.py",
        *stacks,
        "--model-dir",
        tiny_model,
        "--workload",
        f"{workload}@2",
        "--device",
        "cpu",
    ]
    done = run_script(*command, "--concurrency", 7, "--prefix-cache", "--output", output)
    assert done.returncode == 0, done.stderr
    result = load_result(output)
    assert [(x["name"], x["kind"], x["memory"]) for x in result["contestants"]] == [
        ("one", "native", "shared"), ("two", "native", "shared")]  # fmt: skip
    assert [(x["contestant"], x["concurrency"]) for x in result["levels"]] == [("one", 2), ("two", 2)]
    assert result["levels"][0]["samples"]["output_tokens"] == result["levels"][1]["samples"]["output_tokens"]
    assert result["levels"][0]["checks"]["prefix_cache_hit_tokens"] == 5 * 2 * 32
    assert {x["metric"] for x in result["ratios"]} == {"output_tokens_per_s", "ttft", "tpot", "latency"}
    assert "two" in done.stdout


def test_a_stack_that_cannot_be_loaded_says_why(tiny_engine, tmp_path):
    job = {"kind": "native", "path": str(tmp_path), "device": "cpu", "prefix_cache": False, "share": 1.0, "options": {}}
    with pytest.raises(ValueError, match="is not an engine"):
        StackProcess(job)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stack", "native:x"], "two or more"),
        (["--stack", "native:{engine}", "--stack", "native:{engine}"], "different names"),
        (["--stack", "tgi:x"], "--stack takes KIND:PATH with KIND one of native"),
        (["--stack", "a=native:gone", "--stack", "b=native:gone"], "gone does not exist"),
        (["--stack", "native:{engine},fast", "--stack", "b=native:{engine}"], "an option is NAME=VALUE, got 'fast'"),
        (["--target", "a=localhost:80", "--target", "b=http://x"], "--target takes NAME=http://HOST:PORT"),
        (["--target", "a=http://x", "--stack", "native:{engine}", "--swap"], "--swap loads and unloads stacks"),
        (["--target", "a=http://x", "--target", "b=http://y", "--rounds", "0"], "must be at least 1"),
        (
            ["--stack", "native:{engine}", "--stack", "b=native:{engine}", "--workload", "document"],
            "requests of 1250 tokens, native holds 256",
        ),
        (["--target", "a=http://x", "--target", "b=http://y", "--workload", "nonsense"], "there are chat"),
        (
            ["--stack", "native:{engine}", "--stack", "b=native:{engine}", "--swap", "--most-seconds", "9"],
            "no load ends",
        ),
        (["--target", "a=http://x", "--target", "b=http://y", "--workload", "short@1,0"], "NAME or NAME@N,N... with"),
    ],
)
def test_bad_flags_are_one_line(run_script, tiny_engine, tiny_model, flags, message):
    flags = [flag.format(engine=tiny_engine) for flag in flags]
    done = run_script("benchmarks/tournament.py", "--model-dir", tiny_model, *flags, "--device", "cpu")
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


def test_targets_that_do_not_answer_end_the_tournament(run_script, tiny_model, tmp_path):
    targets = ["--target", "a=http://127.0.0.1:9", "--target", "b=http://127.0.0.1:9", "--device", "cpu"]
    output = tmp_path / "t.json"
    done = run_script("benchmarks/tournament.py", "--model-dir", tiny_model, *targets, "--output", output)
    assert done.returncode == 1
    assert "no server answers" in done.stderr
    assert not output.exists()
