"""Lengths, the text prompts are cut from, and workloads: files in, sessions out."""

import itertools
import json
import random
import statistics

import pytest

from llama_engine.errors import InputError
from llama_engine.measure.lengths import Length
from llama_engine.measure.text import Pieces, Prefixes, RandomIds, Text
from llama_engine.measure.traffic import HASH_TOKENS, WORKLOADS, Traffic, read_trace


def text(seed=0):
    return Text(Pieces(), seed)


def first(traffic, count, seed=0, of=None):
    return list(itertools.islice(traffic.sessions(of or text(), seed), count))


@pytest.mark.parametrize("given", ["0", "-3", "x", "5:2", "1:2:3", "", "normal:5", "lognormal:5:1:9:20", "normal:0:1"])
def test_bad_lengths(given):
    with pytest.raises(InputError, match="1 <= LOW <= HIGH"):
        Length.parse(given)


@pytest.mark.parametrize(
    ("given", "middle", "low", "high"),
    [
        ("7", 7, 7, 7),
        ("10:30", 20, 10, 30),
        ("normal:100:10:50:150", 100, 50, 150),
        ("lognormal:60:0.9:4:400", 60, 4, 400),
    ],
)
def test_draws_have_the_distribution_that_was_named(given, middle, low, high):
    length, rng = Length.parse(given), random.Random(0)
    drawn = [length.draw(rng) for _ in range(4000)]
    assert low <= min(drawn)
    assert max(drawn) <= high
    assert statistics.median(drawn) == pytest.approx(middle, rel=0.06)
    assert Length.parse(str(length)) == length
    if given.startswith("lognormal"):  # skewed: a long tail above
        assert statistics.mean(drawn) > 1.2 * statistics.median(drawn)


def test_the_same_seed_sends_the_same_and_no_prompt_twice():
    traffic = Traffic(input_tokens=Length(20, 60), output_tokens=Length(3, 9))
    assert first(traffic, 50) == first(traffic, 50)
    assert first(traffic, 50) != first(traffic, 50, seed=1)
    prefixes, stock = Prefixes(), text()
    for session in first(traffic, 400, of=stock) + first(traffic, 400, of=stock):
        prefixes.add(session.turns[0].prompt)
    assert prefixes.share == 0


def test_groups_share_what_a_prefix_cache_could_find():
    traffic, prefixes = Traffic(input_tokens=Length(16, 16), prefix_groups=3, prefix_tokens=64), Prefixes()
    stock = text()
    sessions = first(traffic, 60, of=stock)
    assert len({tuple(x.prefix) for x in sessions}) == 3
    for session in sessions:
        prefixes.add(session.prefix + session.turns[0].prompt)
    assert prefixes.share == 57 * 64 / (60 * 80)  # all but each group's first
    stock.fresh()
    again = first(traffic, 60, of=stock)
    assert not {tuple(x.prefix) for x in sessions} & {tuple(x.prefix) for x in again}  # no load finds the last one's


def test_a_block_counts_only_behind_the_same_beginning():
    prefixes = Prefixes()
    assert prefixes.add(range(48)) == 0
    assert prefixes.add([*range(32), *[9] * 16]) == 32
    assert prefixes.add([*[9] * 16, *range(16, 48)]) == 0  # the same blocks, another first one
    assert prefixes.add(range(40)) == 32  # whole blocks alone


def test_conversations_have_turns_and_thinking_time():
    traffic = Traffic(turns=Length(1, 4), think_s=2.0)
    sessions = first(traffic, 300)
    assert {len(x.turns) for x in sessions} == {1, 2, 3, 4}
    assert all(x.turns[0].think_s == 0 for x in sessions)
    later = [turn.think_s for x in sessions for turn in x.turns[1:]]
    assert statistics.mean(later) == pytest.approx(2.0, rel=0.2)
    assert traffic.longest == (3 * (32 + 128) + 32, 128)


def test_traces_of_mooncake_and_azure(tmp_path):
    mooncake = tmp_path / "trace.jsonl"
    rows = [(0, 1200, 5, [1, 2, 3]), (1500, 1100, 7, [1, 2, 9]), (2000, 0, 3, [])]
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    mooncake.write_text("".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows))
    a, b = first(Traffic(trace=mooncake), 9)
    assert [(x.arrival_s, len(x.turns[0].prompt), x.turns[0].new_tokens) for x in (a, b)] == [
        (0, 1200, 5),
        (1.5, 1100, 7),
    ]
    shared = 2 * HASH_TOKENS
    assert a.turns[0].prompt[:shared] == b.turns[0].prompt[:shared]
    assert a.turns[0].prompt[shared:1100] != b.turns[0].prompt[shared:]
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.1805900,39,9\n"
    )
    found = list(read_trace(azure))
    assert [(round(t, 6), n, m) for t, n, m, _ in found] == [(0, 374, 44), (1.5, 39, 9)]
    azure.write_text("TIMESTAMP,ContextTokens\nsoon,3\n")
    with pytest.raises(InputError, match=r"azure.csv, line 2"):
        list(read_trace(azure))


def test_sharegpt_keeps_people_s_words_and_answers_lengths(tmp_path):
    path = tmp_path / "talks.json"
    talk = [("human", "How far is the moon?"), ("gpt", "Far."), ("human", "Thanks"), ("gpt", "You are welcome!")]
    path.write_text(json.dumps([{"conversations": [{"from": a, "value": b} for a, b in talk]}, {"conversations": []}]))
    stock = text()
    one = first(Traffic(sharegpt=path), 5, of=stock)
    assert [(stock.codec.decode(t.prompt), t.new_tokens) for x in one for t in x.turns] == [("How far is the moon?", 1)]
    both = first(Traffic(sharegpt=path, turns=Length(1, 9)), 5, of=stock)
    assert [t.new_tokens for t in both[0].turns] == [1, 4]
    path.write_text('{"a": 1}')
    with pytest.raises(InputError, match="not a list"):
        first(Traffic(sharegpt=path), 1)


@pytest.mark.parametrize("path", sorted(WORKLOADS.glob("*.json")), ids=lambda path: path.stem)
def test_the_workloads_that_ship_are_sound(path):
    traffic = Traffic.named(path.stem)
    assert traffic.name == path.stem
    session = first(traffic, 1)[0]
    assert len(session.turns[0].prompt) in range(traffic.input_tokens.low, traffic.input_tokens.high + 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"speed": 3}', "speed: unknown"),
        ("[]", "expected an object"),
        ('{"prefix_groups": 2}', "both given, or neither"),
        ('{"input_tokens": "x"}', "input_tokens take"),
        ('{"trace": "gone.csv"}', "gone.csv does not exist"),
        ('{"sampling": {"heat": 1}}', "heat"),
        ('{"think_s": -1}', "think_s"),
    ],
)
def test_bad_workloads_are_named(tmp_path, content, message):
    path = tmp_path / "w.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        Traffic.named(str(path))


def test_an_unknown_workload_lists_those_there_are():
    with pytest.raises(InputError, match="chat, document"):
        Traffic.named("nonsense")


def test_a_model_without_a_tokenizer_gets_ids_of_its_vocabulary():
    stock = Text(RandomIds(50))
    assert set(stock.take(300)) <= set(range(50))
    with pytest.raises(InputError, match="no text to send"):
        stock.codec.decode([1])
