"""What a request asks for is what it gets: scores, words that may not come, the fewest tokens, where it stops."""

import dataclasses

import pytest

from llama_engine.engine.step import Chunk, Step
from llama_engine.errors import InputError
from llama_engine.native import load_engine
from llama_engine.sampling import SamplingParams
from tests.engine.tools import DelayedExecutor, finish, generate


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_logprobs_come_with_the_tokens_that_ask_for_them(tiny_engine, kernels):
    engine = load_engine(tiny_engine, device="cpu", kernels=kernels)
    asking = SamplingParams(temperature=0.8, repetition_penalty=1.5, logprobs=20)
    requests = [engine.add_request([5, 9, 2], 6, params=p) for p in (asking, SamplingParams())]
    outputs = [output for _ in range(20) for output in engine.step()]
    assert all(output.logprobs is None for output in outputs if output.request_id == requests[1])
    found = [output for output in outputs if output.request_id == requests[0]]
    assert len(found) == 6
    sequence = [5, 9, 2]
    for output in found:
        engine.executor.set_block_table(0, [1])
        expected = engine.executor.submit(Step((Chunk(0, 0, sequence),), "last")).logits()[0].log_softmax(0)
        (given,), (token,) = output.logprobs, output.token_ids
        assert given.token == pytest.approx(expected[token].item(), abs=1e-3)
        assert [value for _, value in given.top] == pytest.approx(expected.topk(20).values.tolist(), abs=1e-3)
        assert [expected[i].item() for i, _ in given.top] == pytest.approx([v for _, v in given.top], abs=1e-3)
        sequence.append(token)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_bad_word_of_several_tokens_is_never_said(tiny_engine, kernels):
    engine, prompt = load_engine(tiny_engine, device="cpu", kernels=kernels), [5, 9, 2]
    free = generate(engine, prompt, 60)
    words = ((free[9], free[10]), tuple(free[20:25]), tuple(prompt + free[:2]), (free[30] ^ 1, free[30]))
    said = generate(engine, prompt, 60, params=SamplingParams(bad_words=words[:1]))
    assert said[:10] == free[:10]
    assert said[10] != free[10]
    assert generate(engine, prompt, 60, params=SamplingParams(bad_words=words[3:])) == free
    said = prompt + generate(engine, prompt, 60, params=SamplingParams(bad_words=words))
    assert said[:4] == prompt + free[:1]
    assert said[4] != free[1]  # its word begins in the prompt
    assert not any(tuple(said[i : i + len(word)]) == word for word in words for i in range(63))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_prompt_is_scored_as_its_tokens_are_when_they_are_made(tiny_engine, kernels, monkeypatch):
    """In chunks, beside others, with its prefix cached, and after a preemption half-way."""
    monkeypatch.setattr("llama_engine.engine.scheduler.SCORED_TOKENS", 16)
    engine = load_engine(tiny_engine, device="cpu", kernels=kernels, enable_prefix_cache=True)
    engine.add_request([5, 9, 2], 50, params=SamplingParams(temperature=0.8, seed=4, logprobs=3))
    made = [output for _ in range(60) for output in engine.step()]
    text = [5, 9, 2, *(output.token_ids[0] for output in made)]
    asking = SamplingParams(logprobs=3, prompt_logprobs=True)
    for preempted in (False, True):
        other = engine.add_request([7, 7], 30)
        request = engine.add_request(text, 4, params=asking)
        outputs = engine.step() + engine.step()
        if preempted:
            engine.scheduler._preempt(engine.scheduler.running[-1])
        while engine.has_unfinished:
            outputs += engine.step()
        assert all(output.prompt_logprobs is None for output in outputs if output.request_id == other)
        first, *rest = (output for output in outputs if output.request_id == request)
        assert all(output.prompt_logprobs is None for output in rest)
        assert len(first.prompt_logprobs) == len(text) - 1
        for scored, output in zip(first.prompt_logprobs[2:], made):
            assert scored.token == pytest.approx(output.logprobs[0].token, abs=1e-3)
            assert dict(scored.top) == pytest.approx(dict(output.logprobs[0].top), abs=1e-3)
    assert engine.add_request(text, 4) is not None
    assert engine.step()[0].cached_tokens == 48  # which a prompt that is scored may not skip


def test_a_token_that_does_not_exist_cannot_be_biased(tiny_engine):
    engine = load_engine(tiny_engine, device="cpu")
    with pytest.raises(InputError, match="names token 512, the vocabulary has 0 to 511"):
        engine.add_request([1], 1, params=SamplingParams(bad_words=((512,),)))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_end_comes_before_the_fewest_tokens(tiny_engine, kernels, asynchronous):
    """As an answer whose ends are banned, broken off at min_tokens and gone on with; beside others, and preempted."""
    engine, prompt, new, fewest = load_engine(tiny_engine, device="cpu", kernels=kernels), [5, 9, 2], 60, 12
    if asynchronous:
        engine.executor = DelayedExecutor(engine.executor)
    said = {"repetition_penalty": 1.2, "frequency_penalty": 0.5}
    for params in (
        SamplingParams(),
        SamplingParams(1.0, seed=4, logit_bias=((7, 3.0),), bad_words=((3,), (1, 2)), **said, logprobs=1),
    ):
        free = generate(engine, prompt, new, params=params)
        ends = [free[0], free[5], free[40], 7]  # one has a bias, too
        banned = dataclasses.replace(params, bad_words=(*params.bad_words, *((end,) for end in ends)))
        first = generate(engine, prompt, fewest, params=banned)
        rest = engine.make_request(prompt, new - fewest, params=params, stop_token_ids=ends, output=first)
        engine.add(rest)
        whole = first + finish(engine)[rest.request_id]
        assert whole[-1] in ends or len(whole) == new
        asked = {"params": params, "stop_token_ids": ends, "min_tokens": fewest}
        assert generate(engine, prompt, new, **asked) == whole != free
        assert generate(engine, prompt, fewest, **asked) == first
        resumed = engine.make_request(prompt, new - 8, **asked, output=first[:8])
        engine.add(resumed)
        assert first[:8] + finish(engine)[resumed.request_id] == whole
        for broken_off in (6, 13):
            others = [engine.add_request([7, i], 30, params=params) for i in range(2)]
            request, tokens = engine.add_request(prompt, new, **asked), []
            for step in range(200):
                running = engine.scheduler.running
                if step == broken_off and not asynchronous:
                    engine.scheduler._preempt(next(s for s in running if s.request_id == request))
                tokens += [t for output in engine.step() if output.request_id == request for t in output.token_ids]
            assert tokens == whole
            assert not engine.has_unfinished, others


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"min_tokens": 9}, r"min_tokens must be an integer in \[0, 8\], the answer's limit; got 9"),
        ({"min_tokens": -1}, "min_tokens must be"),
        ({"min_tokens": 1.0}, "min_tokens must be"),
        ({"min_tokens": 1, "grammar": object()}, "min_tokens and a grammar contradict"),
        (
            {"min_tokens": 1, "params": SamplingParams(logit_bias=tuple((i, 1.0) for i in range(512)))},
            "what min_tokens holds back name 513 tokens",
        ),
    ],
)
def test_fewest_tokens_that_cannot_be_kept_to_are_refused(tiny_engine, asked, message):
    engine = load_engine(tiny_engine, device="cpu", kernels="torch")
    engine.model_config = dataclasses.replace(engine.model_config, vocab_size=1024)
    with pytest.raises(InputError, match=message):
        engine.make_request([1], 8, stop_token_ids=[600], **asked)


def test_an_end_that_is_no_token_needs_no_holding_back(tiny_engine):
    engine = load_engine(tiny_engine, device="cpu")
    free = generate(engine, [5], 6)
    assert generate(engine, [5], 6, stop_token_ids=[-1, 512, 1 << 31], min_tokens=3) == free


def test_stop_token_ends_a_request_and_reason_says_so(tiny_engine):
    engine = load_engine(tiny_engine, device="cpu")
    free = generate(engine, [1, 2, 3], 20)
    engine.add_request([1, 2, 3], 20, stop_token_ids=(free[4],))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    stop_at = free.index(free[4])
    assert [token for output in outputs for token in output.token_ids] == free[: stop_at + 1]
    assert (outputs[-1].finished, outputs[-1].reason) == (True, "stop")
    engine.add_request([1, 2, 3], 1)
    (output,) = engine.step()
    assert (output.finished, output.reason) == (True, "length")
