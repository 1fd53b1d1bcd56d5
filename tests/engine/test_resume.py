"""An answer that breaks off on one engine goes on on another as if nothing had happened."""

import pytest

from llama_engine.errors import InputError
from llama_engine.native import load_engine
from llama_engine.sampling import SamplingParams
from tests.engine.tools import DelayedExecutor, check_invariants

PROMPT = [(7 * i) % 512 for i in range(30)]
NEW = 40
ASKED = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=1.2, top_p=0.9, top_k=100, seed=5),
    "output counted": SamplingParams(presence_penalty=1.5, frequency_penalty=1.0),
    "all counted": SamplingParams(temperature=0.8, seed=2**64 - 1, repetition_penalty=1.5, frequency_penalty=0.5),
    "biased": SamplingParams(
        temperature=1.0, min_p=0.05, logit_bias=((3, 5.0),), bad_words=((7,), (8,)), seed=1, logprobs=2
    ),
}


@pytest.fixture(scope="module")
def engines(tiny_engine):
    """Two of the same directory, as replicas are; the second delays its results, as a GPU does."""
    first, second = (load_engine(tiny_engine, device="cpu", threads=1) for _ in range(2))
    second.executor = DelayedExecutor(second.executor)
    return first, second


def answer(engine, prompt, new, params, output=(), stops=()):
    """(ids, log-probabilities, why it ended) of one request, in a batch with another."""
    sequence = engine.make_request(prompt, new, params=params, output=output, stop_token_ids=stops)
    engine.add(engine.make_request([9, 9, 9], 25, params=SamplingParams(temperature=1.0, seed=3)))
    engine.add(sequence)
    ids, logprobs, reason = [], [], None
    while engine.has_unfinished:
        for made in engine.step():
            if made.request_id == sequence.request_id:
                ids += made.token_ids
                logprobs += made.logprobs or []
                reason = made.reason or reason
        check_invariants(engine)
    return ids, logprobs, reason


@pytest.mark.parametrize("asked", ASKED)
def test_the_rest_of_an_answer_is_the_same_wherever_it_broke_off(engines, asked):
    params = ASKED[asked]
    whole, logprobs, _ = answer(engines[0], PROMPT, NEW, params)
    assert len(whole) == NEW
    for made in (1, 2, 3, 17, 18, 34, NEW - 1):  # 2, 18 and 34 end a block of 16
        rest, more, reason = answer(engines[1], PROMPT, NEW - made, params, whole[:made])
        assert (rest, more, reason) == (whole[made:], logprobs[made:], "length")


def test_a_stop_token_ends_what_was_resumed(engines):
    whole, _, _ = answer(engines[0], PROMPT, NEW, ASKED["sampled"])
    stop = whole[20]
    made = whole.index(stop) - 1
    assert made > 0
    rest = answer(engines[1], PROMPT, NEW - made, ASKED["sampled"], whole[:made], stops=[stop])
    assert rest == ([whole[made], stop], [], "stop")


def test_penalties_need_to_know_where_the_prompt_ends(engines):
    params = ASKED["output counted"]
    whole, _, _ = answer(engines[0], PROMPT, NEW, params)
    assert answer(engines[1], PROMPT + whole[:20], NEW - 20, params)[0] != whole[20:]


def test_prompt_and_both_parts_of_the_answer_must_fit(engines):
    with pytest.raises(InputError, match="250 prompt tokens \\+ 7 new tokens exceed"):
        engines[0].make_request([1] * 50, 7, output=[1] * 200)
    with pytest.raises(InputError, match="outside the vocabulary"):
        engines[0].make_request([1], 7, output=[512])


def test_what_is_resumed_is_looked_up_in_the_prefix_cache_whole(tiny_engine):
    engine = load_engine(tiny_engine, device="cpu", threads=1, enable_prefix_cache=True)
    whole, _, _ = answer(engine, [5] * 20, 40, None)
    asked = engine.scheduler.prefix_cache_query_tokens
    assert answer(engine, [5] * 20, 10, None, whole[:30])[0] == whole[30:]
    assert engine.scheduler.prefix_cache_query_tokens - asked == 50 + 3
    assert engine.scheduler.prefix_cache_hit_tokens == 48
