import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_engine.errors import InputError
from llama_engine.sampling import SamplingParams, sample, uniform

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"seed": -1}],
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
