import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_engine.errors import InputError
from llama_engine.model.sampler import logprobs, sample, weights
from llama_engine.sampling import NOT_FINITE, SamplingParams, count_tokens, recent_tokens, uniform

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, allow_infinity=False),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**64 - 1),
)


def draw(logits, params, positions, history=None):
    """Ids drawn from one row of logits at many positions."""
    counts = None if history is None else torch.from_numpy(count_tokens(*history, len(logits)))[None]
    return sample(logits.expand(len(positions), -1), [params] * len(positions), positions, counts)


def kept_by_definition(logits, params, history):
    """The ids that may be drawn, in their order, each with its weight: one id after the other, in float64."""
    prompt, output = history
    x = logits.double().tolist()
    for i in set(prompt) | set(output):
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
        if i in output:
            x[i] -= params.frequency_penalty * output.count(i) + params.presence_penalty
    for i, bias in params.logit_bias:
        x[i] += bias
    for *before, i in params.bad_words:
        if (prompt + output)[len(prompt + output) - len(before) :] == before:
            x[i] = -math.inf
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if params.greedy:
        return {order[0]: 1}
    # 2**t and not e**(x / temperature): exact where t is an integer
    t = [(value - x[order[0]]) * (math.log2(math.e) / params.temperature) for value in x]
    mass = [math.floor(2.0 ** (28 + value)) for value in t]
    kept = order[: params.top_k or None]
    total, reached, nucleus = sum(mass[i] for i in kept), 0, []
    for i in kept:
        if reached >= params.top_p * total:
            break
        nucleus.append(i)
        reached += mass[i]
    return {i: mass[i] for i in sorted(nucleus) if mass[i] and (not params.min_p or t[i] >= math.log2(params.min_p))}


def defined(logits, params, position, history):
    kept = kept_by_definition(logits, params, history)
    goal = Fraction(uniform(params.seed, position)) * sum(kept.values())
    sums = zip(kept, itertools.accumulate(kept.values()))
    return next(i for i, running in sums if running > goal)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 10**400},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": math.nan},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_p": None},
        {"seed": -1},
        {"seed": 0.5},
        {"seed": 1 << 64},
        {"top_k": 1 << 31},
        {"min_p": -0.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": True},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"frequency_penalty": "1"},
        {"logit_bias": ((3, 101.0),)},
        {"logit_bias": ((3, None),)},
        {"logit_bias": ((3.5, 1.0),)},
        {"bad_words": ((1.5,),)},
        {"bad_words": ((),)},
        {"bad_words": (tuple(range(33)),)},
        {"bad_words": ((1, 2),) * 257},
        {"bad_words": tuple((i,) for i in range(513))},
        {"logprobs": 21},
        {"logprobs": 1.5},
    ],
)
def test_bad_parameters_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        SamplingParams(**bad)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(bad_words=((5,),)),
        SamplingParams(bad_words=((1, 5, 2),)),
        SamplingParams(logit_bias=((-1, 1.0),)),
    ],
)
def test_a_token_outside_the_vocabulary_is_named(params):
    with pytest.raises(InputError, match=r"names token (5|-1), the vocabulary has 0 to 4"):
        params.check_vocabulary(5)


def test_greedy_is_the_first_argmax():
    tied = torch.tensor([[0.0, 3.0, 3.0, -0.0]])
    for params in (SamplingParams(), SamplingParams(temperature=5, top_k=1), SamplingParams(temperature=1e-300)):
        assert sample(tied, [params], [0]).tolist() == [1]
    assert sample(LOGITS[None], [SamplingParams(bad_words=((1,),), logit_bias=((0, 2.5),))], [0]).tolist() == [0]


@pytest.mark.parametrize("row", [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_a_broken_row_gives_no_token(row):
    for params in (SamplingParams(), SamplingParams(temperature=1, top_p=0.5)):
        assert sample(torch.tensor([row]), [params], [0]).tolist() == [NOT_FINITE]


def test_a_draw_depends_on_seed_and_position_alone():
    hot = SamplingParams(temperature=10, seed=7)
    draws = draw(LOGITS, hot, range(200)).tolist()
    batch = torch.stack([LOGITS, LOGITS * 2])
    mixed = [sample(batch, [hot, SamplingParams(2.0, top_k=2)], [i, 5])[0].item() for i in range(200)]
    assert draws == mixed
    assert draws != draw(LOGITS, SamplingParams(temperature=10, seed=8), range(200)).tolist()
    assert set(draws) == set(range(5))


def test_the_ends_of_top_k_and_top_p_are_exact():
    tied = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    hot = {"temperature": 1.0}
    assert set(draw(tied, SamplingParams(**hot, top_k=3), range(200)).tolist()) == {0, 1, 3}
    assert set(draw(tied, SamplingParams(**hot, top_k=99), range(200)).tolist()) == set(range(6))
    equal = torch.zeros(8)
    assert set(draw(equal, SamplingParams(**hot, top_p=0.5), range(200)).tolist()) == {0, 1, 2, 3}
    assert set(draw(equal, SamplingParams(**hot, top_p=0.501), range(200)).tolist()) == {0, 1, 2, 3, 4}
    assert set(draw(equal, SamplingParams(**hot, top_k=4, top_p=0.5), range(200)).tolist()) == {0, 1}
    assert set(draw(LOGITS, SamplingParams(**hot, min_p=math.exp(-2)), range(200)).tolist()) == {1, 2, 3}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=4, max_size=60),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        top_k=st.integers(0, 70),
        top_p=st.sampled_from([1.0, 0.9, 0.613, 0.1]),
        min_p=st.sampled_from([0.0, 0.013, 0.7]),
        seed=st.integers(0, 2**64 - 1),
        repetition_penalty=st.sampled_from([1.0, 2.0, 0.5]),
        presence_penalty=st.sampled_from([0.0, 1.5]),
        frequency_penalty=st.sampled_from([0.0, -0.25]),
        logit_bias=st.sampled_from([(), ((0, 3.0), (2, -4.5))]),
        bad_words=st.sampled_from([(), ((3,),), ((2, 2, 0), (1, 2, 2, 1)), ((1, 0), (2, 3), (0, 1, 1, 2, 2, 2))]),
    ),
    st.integers(0, 2**31),
)
def test_the_reference_does_what_is_defined(values, params, position):
    logits, history = torch.tensor(values) / 8, ([0, 1], [1, 2, 2])
    position = 5 if params.phrases else position
    counts = torch.from_numpy(count_tokens(*history, len(values)))[None]
    token = sample(logits[None], [params], [position], counts, recent_tokens(*history)[None]).item()
    assert token == defined(logits, params, position, history)


def test_a_bad_word_looks_back_as_far_as_it_is_long():
    def forbids(word, prompt, output=()):
        """Whether the word is forbidden: token 1 is the most likely, 3 the next."""
        params, position = SamplingParams(bad_words=(word,)), len(prompt) + len(output)
        token = sample(LOGITS[None], [params], [position], recent=recent_tokens(prompt, output)[None])
        return token.tolist() == [3]

    for start in range(70):  # wherever in the ring it lies, in prompt and output
        before = [0, 2] * 15
        assert forbids((4, *before, 1), [2] * start + [4], before)
        assert forbids((*before, 1), [2] * start + before[:7], before[7:])
        assert not forbids((0, *before, 1), [2] * start + [4], before)
        assert not forbids((4, *before, 1), [2] * start + [4], before[:-1])
    assert not forbids((0, 1), [])  # nothing stands before the first token
    assert forbids((1,), [])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, seed=3),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.9, seed=4),
        SamplingParams(temperature=2.0, min_p=0.1, repetition_penalty=1.5, presence_penalty=0.5, seed=2**64 - 1),
    ],
)
def test_frequencies_follow_the_distribution(params):
    draws, vocab, history = 40_000, 64, ([1, 2], [3, 4, 4])
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(0)) * 1.5
    observed = torch.bincount(draw(logits, params, range(draws), history), minlength=vocab).double().numpy()
    x = logits.double().numpy().copy()
    for i in (1, 2, 3, 4):
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
    x[[3, 4]] -= params.presence_penalty
    order = np.argsort(-x, kind="stable")
    p = np.exp((x - x.max()) / params.temperature)
    largest = p.max()
    kept = order[: params.top_k or vocab]
    share = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[share - p[kept] / p[kept].sum() < params.top_p]
    kept = kept[p[kept] >= params.min_p * largest]
    expected = draws * p[kept] / p[kept].sum()
    assert observed[kept].sum() == draws
    freedom = len(kept) - 1
    statistic = ((observed[kept] - expected) ** 2 / expected).sum()
    # Wilson and Hilferty 1931: the cube root of chi-square over its freedom is close to normal; 4 deviations
    assert ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)) < 4


def test_weights_are_powers_to_a_millionth():
    x = torch.linspace(-12, 0, 4001)
    found = weights(x[None], torch.tensor([[math.log2(math.e)]]))[0].double() / 2**28
    torch.testing.assert_close(found, x.double().exp(), rtol=2e-6, atol=2**-28)


def test_logprobs_are_of_the_raw_logits():
    chosen, ids, values = logprobs(LOGITS[None], torch.tensor([2]), 2)
    expected = torch.log_softmax(LOGITS, 0)
    assert ids.tolist() == [[1, 3]]
    torch.testing.assert_close(chosen, expected[[2]])
    torch.testing.assert_close(values, expected[[1, 3]][None])


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_uniform_stays_in_range(seed, position):
    assert 0 <= uniform(seed, position) < 1


@settings(deadline=None)
@given(PARAMS, st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@example(SamplingParams(1e-45), [0.0, 3.0, 1.0])
@example(SamplingParams(1.0, top_p=1e-300), [0.0, 3.0, 1.0])
@example(SamplingParams(1.7e308), [0.0, -3.4e38, 3.4e38])
def test_any_accepted_parameters_pick_an_id_of_any_finite_logits(params, logits):
    token = int(sample(torch.tensor([logits]), [params], [5]))
    assert 0 <= token < len(logits)
    if params.temperature < 1e-37 or params.top_p < 1e-37:
        assert logits[token] == max(logits)


@settings(deadline=None)
@given(PARAMS, st.sampled_from([[0.0, math.nan, 1.0], [0.0, math.inf], [-math.inf] * 3, [math.nan] * 2]))
def test_logits_without_a_finite_maximum_pick_nothing(params, logits):
    assert sample(torch.tensor([logits]), [params], [5]).tolist() == [NOT_FINITE]
