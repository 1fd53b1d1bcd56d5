import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from llama_engine.errors import InputError
from llama_engine.sampling import NOT_FINITE, SamplingParams, sample, uniform

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, allow_infinity=False),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**64 - 1),
)


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
    ],
)
def test_bad_parameters_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_greedy_is_argmax():
    assert sample(LOGITS, SamplingParams(), 0) == 1
    assert sample(LOGITS, SamplingParams(temperature=5, top_k=1), 0) == 1


def test_a_draw_depends_on_seed_and_position_alone():
    hot = SamplingParams(temperature=10, seed=7)
    draws = [sample(LOGITS, hot, position) for position in range(200)]
    assert draws == [sample(LOGITS, hot, position) for position in range(200)]
    assert draws != [sample(LOGITS, SamplingParams(temperature=10, seed=8), position) for position in range(200)]
    assert set(draws) == set(range(5))


def test_top_k_and_top_p_restrict_the_choice():
    top2 = SamplingParams(temperature=100, top_k=2)
    assert {sample(LOGITS, top2, position) for position in range(100)} == {1, 3}
    probabilities = torch.softmax(LOGITS, 0)
    nucleus = SamplingParams(temperature=1, top_p=float(probabilities[1]) - 1e-3)
    assert {sample(LOGITS, nucleus, position) for position in range(100)} == {1}


def test_frequencies_follow_the_distribution():
    draws = torch.tensor([sample(LOGITS, SamplingParams(temperature=1, seed=3), i) for i in range(4000)])
    observed = torch.bincount(draws, minlength=5) / 4000
    torch.testing.assert_close(observed, torch.softmax(LOGITS, 0), atol=0.03, rtol=0)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_uniform_stays_in_range(seed, position):
    assert 0 <= uniform(seed, position) < 1


@given(PARAMS, st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@example(SamplingParams(1e-45), [0.0, 3.0, 1.0])
@example(SamplingParams(1.0, top_p=1e-300), [0.0, 3.0, 1.0])
@example(SamplingParams(1.7e308), [0.0, -3.4e38, 3.4e38])
def test_any_accepted_parameters_pick_an_id_of_any_finite_logits(params, logits):
    token = sample(torch.tensor(logits), params, 5)
    assert 0 <= token < len(logits)
    if params.temperature < 1e-37 or params.top_p < 1e-37:
        assert logits[token] == max(logits)


@given(PARAMS, st.sampled_from([[0.0, math.nan, 1.0], [0.0, math.inf], [-math.inf] * 3, [math.nan] * 2]))
def test_logits_without_a_finite_maximum_pick_nothing(params, logits):
    assert sample(torch.tensor(logits), params, 5) == NOT_FINITE
