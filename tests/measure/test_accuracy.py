"""Figures by hand, the gate's every limit, and the engine's logits against its own greedy tokens."""

import math

import pytest
import torch

from llama_engine.measure import accuracy
from llama_engine.measure.generation import GenerationRun
from llama_engine.native import load_engine

GOOD = {"tokens": 20_000, "perplexity_ratio": 1.005, "kl_mean": 0.004}


def test_identical_logits_have_no_distance():
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    windows = [[1, 2, 3, 4, 5, 6]]
    result = accuracy.compare_logits(lambda ids: logits, lambda ids: logits, windows, synthetic=False)
    assert result["tokens"] == 5
    assert result["kl_mean"] == result["kl_max"] == 0
    assert result["perplexity_ratio"] == result["top1_agreement"] == 1


def test_figures_by_hand():
    """p = (3/4, 1/4), q = (1/3, 2/3), the next token is 0: all figures in closed form, and KL(q, p) is another."""
    p, q = torch.tensor([[0.75, 0.25]] * 2).log(), torch.tensor([[1 / 3, 2 / 3]] * 2).log()
    result = accuracy.compare_logits(lambda ids: p, lambda ids: q, [[0, 0]], synthetic=False)
    assert result["perplexity_baseline"] == pytest.approx(4 / 3)
    assert result["perplexity_engine"] == pytest.approx(3)
    assert result["kl_mean"] == pytest.approx(0.75 * math.log(9 / 4) + 0.25 * math.log(3 / 8))
    assert result["top1_agreement"] == 0
    errors = accuracy.compare_logits(lambda ids: p, lambda ids: q, [[0, 0]], synthetic=True)
    assert errors["logit_error_max"] == pytest.approx(math.log(8 / 3) / math.log(4))
    assert "perplexity_ratio" not in errors


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"perplexity_ratio": 1.011}, "perplexity_ratio 1.01100 is above 1.01"),
        ({"perplexity_ratio": math.nan}, "perplexity_ratio nan"),
        ({"kl_mean": 0.011}, "kl_mean"),
        ({"tokens": 19_999}, "tokens scored"),
    ],
)
def test_each_limit_can_fail(change, reason):
    assert accuracy.gate(GOOD)["status"] == "PASSED"
    verdict = accuracy.gate(GOOD | change)
    assert verdict["status"] == "FAILED"
    assert reason in verdict["reasons"][0]


def test_quick_and_synthetic_gates():
    assert accuracy.gate(GOOD | {"tokens": 10}, full=False)["status"] == "PASSED"
    sound = {"tokens": 5, "logit_error_rms": 0.001, "served_error_rms": 0.001}
    assert accuracy.gate(sound)["status"] == "PASSED"
    for key in ("logit_error_rms", "served_error_rms"):
        for value in (0.02, math.nan):
            assert accuracy.gate(sound | {key: value})["status"] == "FAILED"
    assert accuracy.gate({"tokens": 30_000, "perplexity_ratio": 1.0})["status"] == "FAILED"  # KL is missing


def test_greedy_agreement_counts_up_to_the_first_difference():
    runs = [GenerationRun(0.0, [], ids) for ids in ([1, 2, 3], [4, 5, 6], [7, 8, 9])]
    other = [GenerationRun(0.0, [], ids) for ids in ([1, 2, 3], [4, 0, 6], [0, 8, 9])]
    result = accuracy.greedy_agreement(runs, other)
    assert result["lengths"] == [3, 1, 0]
    assert (result["mean"], result["of"]) == (pytest.approx(4 / 3), 3)


def test_engine_logits_predict_its_own_greedy_tokens(tiny_engine, monkeypatch):
    """Chunks of 5 cross a block boundary; each row's argmax is what the engine generates next."""

    monkeypatch.setattr(accuracy, "CHUNK_TOKENS", 5)
    engine = load_engine(tiny_engine, device="cpu", kernels="torch")
    engine.add_request([3, 1, 4, 1, 5], 20)
    tokens = [
        token for _ in iter(lambda: engine.has_unfinished, False) for out in engine.step() for token in out.token_ids
    ]
    logits = accuracy.engine_logits(engine, [3, 1, 4, 1, 5, *tokens])
    assert logits.shape == (25, engine.model_config.vocab_size)
    assert logits[4:-1].argmax(-1).tolist() == tokens


def test_the_error_of_served_logits(tiny_engine):

    engine = load_engine(tiny_engine, device="cpu")
    reference = load_engine(tiny_engine, device="cpu", kernels="torch")

    def logits(ids):
        return accuracy.engine_logits(reference, ids)

    prompt = [3, 1, 4, 1, 5]
    assert accuracy.served_error(logits, engine, prompt, 6) < accuracy.MAX_LOGIT_ERROR_RMS

    def wrong_at_the_end(ids):
        found = logits(ids)
        found[-1] *= 1.1
        return found

    assert accuracy.served_error(wrong_at_the_end, engine, prompt, 6) == pytest.approx(0.1 / 1.1, rel=0.05)
    submit = engine.executor.submit

    def another_token(step):
        handle = submit(step)
        tokens = [token + 1 for token in handle.tokens()]
        handle.tokens = lambda: tokens
        return handle

    engine.executor.submit = another_token
    assert math.isnan(accuracy.served_error(logits, engine, prompt, 6))
