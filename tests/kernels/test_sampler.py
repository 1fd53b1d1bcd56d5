"""The kernels' draws against :func:`llama_engine.model.sampler.sample`: the same token, always."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_engine.native import load_engine
from llama_engine.sampling import NOT_FINITE, SamplingParams
from tests.kernels.samplers import assert_equal, on_cpu, on_gpu, reference
from tests.repeats import quick

INF = math.inf
VOCAB = 700


def row_of(kind):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(VOCAB, generator=generator)
    ids = torch.arange(VOCAB)
    return {
        "normal": normal,
        "peaked": normal * 6,
        "flat": normal * 1e-3,
        "tied": (normal * 2).round(),
        "equal": torch.full((VOCAB,), -3.25),
        "zeros of both signs": torch.where(ids % 3 == 0, -0.0, 0.0),
        "mostly banned": torch.where(ids % 97 == 5, normal, -INF),
        "one token": torch.where(ids == 600, 1.0, -INF),
        "huge": normal * 1e37,
        "tiny": normal * 1e-38,
        "one step apart": torch.nextafter(torch.ones(VOCAB), torch.where(ids % 2 == 0, INF, 0.0)),
        "largest float": torch.where(ids % 2 == 0, torch.finfo(torch.float32).max, 0.0),
    }[kind]


KINDS = ["normal", "peaked", "flat", "tied", "equal", "zeros of both signs", "mostly banned", "one token", "huge"]
KINDS += ["tiny", "one step apart", "largest float"]
FILTERS = [
    {},
    {"top_k": 3},
    {"top_k": 2 * VOCAB},
    {"top_k": 300},
    {"top_p": 0.6},
    {"top_p": 1e-9},
    {"top_k": 299, "top_p": 0.97},
    {"top_k": 9, "top_p": 0.3, "min_p": 0.5},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1e-30},
    {"temperature": 1e-300},
    {"temperature": 1e300, "top_p": 0.5},
    {"temperature": 30.0, "top_k": 350, "top_p": 0.5},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.7, "logit_bias": ((5, 2.5), (6, -1.0))},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.7, "top_p": 0.9},
    {"bad_words": ((0,), (2,), (600,)), "top_k": 5},
    {"bad_words": tuple((8, 0, i) for i in range(0, VOCAB, 9)), "top_p": 0.95},  # more than are tried together
    {"temperature": 0.0, "bad_words": ((8, 8, 8, 0, 600), (1, 5, 5, 600, 2, 5, 8, 8, 8, 0, 0), (0, 0, 601), (8, 602))},
]
HISTORY = ([1, 5, 5, 600, 2], [5, 8, 8, 8, 0])
BROKEN = [[0.0, math.nan, 1.0], [math.nan, 0.0, 9.0], [0.0, -math.nan, 2.0], [1.0, INF, 0.0], [-INF, -INF, -INF]]


def cases(kind):
    params = [SamplingParams(**({"temperature": 0.8, "seed": 2**63 + 7 * i} | f)) for i, f in enumerate(FILTERS)]
    positions = [10 if p.phrases else 31 * i for i, p in enumerate(params)]
    logits = row_of(kind).expand(len(params), VOCAB).contiguous()
    return logits, params, positions, [HISTORY] * len(params)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cpu_kernel_is_the_reference(cpu_sampler, kind):
    arguments = cases(kind)
    assert_equal(arguments[1], on_cpu(cpu_sampler, *arguments), reference(*arguments))


def test_the_threads_of_an_engine_share_the_rows(cpu_sampler, tiny_engine):
    executor = load_engine(tiny_engine, device="cpu", threads=3).executor
    for kind in KINDS[:4]:
        arguments = cases(kind)
        for _ in range(20):
            alone = on_cpu(cpu_sampler, *arguments)
            assert_equal(arguments[1], on_cpu(executor._model.sampler, *arguments), alone)
    one_row = [part[:1] for part in cases("normal")]
    assert on_cpu(executor._model.sampler, *one_row)[0] == reference(*one_row)[0]


@pytest.mark.parametrize(
    ("kind", "narrow"),
    quick(
        itertools.product(KINDS, (False, True)), *[(kind, False) for kind in KINDS], ("normal", True), ("tied", True)
    ),
)
def test_the_gpu_kernel_is_the_reference(device, kind, narrow, monkeypatch):
    from llama_engine.kernels import sampler

    if narrow:  # many chunks, and more passes before the candidates fit
        monkeypatch.setattr(sampler, "WARPS", 1)
        monkeypatch.setattr(sampler, "CANDIDATES", 32)
    arguments = cases(kind)
    if device.type == "cpu":  # interpreted, a row takes a second: each kind and filter meet in one of the two widths
        half = slice((KINDS.index(kind) + narrow) % 2, None, 2)
        arguments = tuple(part[half] for part in arguments)
    assert_equal(arguments[1], on_gpu(*arguments, device), reference(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "programs"), [("normal", 2), ("tied", 4), ("flat", 4), ("mostly banned", 2), ("equal", 8), ("peaked", 16)]
)
def test_a_row_in_pieces_is_the_reference(device, split, kind, programs):
    split(programs)
    logits, params, positions, histories = cases(kind)
    some = range(programs % 3, len(params), 3)
    arguments = logits[some], [params[i] for i in some], [positions[i] for i in some], histories[: len(some)]
    assert_equal(arguments[1], on_gpu(*arguments, device), reference(*arguments))


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, in the interpreter
def test_a_broken_row_in_pieces_gives_no_token(device, split):
    split(2)
    logits = torch.full((2 * len(BROKEN), VOCAB), -1.0)
    logits[: len(BROKEN), :3] = logits[len(BROKEN) :, -3:] = torch.tensor(BROKEN)
    logits[[4, 9]] = -INF
    for p in (SamplingParams(1.0), SamplingParams(1.0, top_p=0.5), SamplingParams(repetition_penalty=2.0)):
        arguments = logits, [p] * len(logits), [0] * len(logits), [([0], [])] * len(logits)
        assert on_gpu(*arguments, device)[0] == [NOT_FINITE] * len(logits)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, in the interpreter
def test_a_broken_row_gives_no_token(device, cpu_sampler):
    logits = torch.tensor(BROKEN)
    for p in (SamplingParams(1.0), SamplingParams(1.0, top_p=0.5), SamplingParams(repetition_penalty=2.0)):
        arguments = logits, [p] * len(BROKEN), [0] * len(BROKEN), [([0], [])] * len(BROKEN)
        assert reference(*arguments)[0] == [NOT_FINITE] * len(BROKEN)
        assert on_cpu(cpu_sampler, *arguments)[0] == [NOT_FINITE] * len(BROKEN)
        assert on_gpu(*arguments, device)[0] == [NOT_FINITE] * len(BROKEN)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(1e-3, 1e3),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(1e-6, 1.0),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.9]),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
    logit_bias=st.lists(st.tuples(st.integers(0, VOCAB - 1), st.floats(-100, 100)), max_size=5).map(tuple),
    bad_words=st.lists(st.lists(st.sampled_from([8, 0, 5, 600, 3]), min_size=1, max_size=4).map(tuple)).map(tuple),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PARAMS, st.sampled_from(KINDS[:7]), st.integers(0, 2**31 - 1))
def test_the_cpu_kernel_for_any_parameters(cpu_sampler, params, kind, position):
    arguments = row_of(kind)[None].clone(), [params], [10 if params.phrases else position], [HISTORY]
    assert on_cpu(cpu_sampler, *arguments)[0] == reference(*arguments)[0]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PARAMS, st.sampled_from(KINDS[:7]), st.integers(0, 2**31 - 1))
def test_the_gpu_kernel_for_any_parameters(device, params, kind, position):
    arguments = row_of(kind)[None].clone(), [params], [10 if params.phrases else position], [HISTORY]
    assert on_gpu(*arguments, device)[0] == reference(*arguments)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("spread", [0.0, 0.02, 1.3, 5.0])
@pytest.mark.parametrize("programs", [None, 1, 8, 32])  # a row; also more in all than run at once
def test_a_whole_vocabulary_on_the_gpu(spread, programs, monkeypatch):
    from llama_engine.kernels import sampler

    monkeypatch.setattr(sampler, "SPLITS", programs)
    vocab, rows = 128256, 64
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, vocab, generator=generator) * spread
    logits[1::2] = (logits[1::2] * 4).round() / 4  # ties
    kept = [
        *({}, {"top_p": 0.95}, {"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.999}, {"top_p": 1e-4}),
        *({"min_p": 0.05}, {"top_k": 60000, "top_p": 0.9}, {"top_k": 100000}, {"top_p": 0.5, "frequency_penalty": 0.5}),
        {"temperature": 5.0, "top_p": 0.9},
    ]
    params = [SamplingParams(**({"temperature": 0.8, "seed": row} | kept[row % len(kept)])) for row in range(rows)]
    arguments = logits, params, list(range(rows)), [([1, 2, 3], [4, 4, 9])] * rows
    assert on_gpu(*arguments, torch.device("cuda"))[0] == reference(*arguments)[0]
