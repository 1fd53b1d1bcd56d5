"""Where top-k, top-p and min-p end, and where one token's draws end and the next one's begin: exactly there.

Every t of these rows is an integer, so weights are powers of two, and float64 knows each sum and each tie.
"""

import itertools
import math

import pytest
import torch

from llama_engine.sampling import SamplingParams, random_bits
from tests.kernels.samplers import on_cpu, on_gpu, reference
from tests.repeats import quick
from tests.test_sampling import kept_by_definition

VOCAB = 300
TEMPERATURE = math.log2(math.e)  # one logit less is half the weight
MORE = 2**-30  # the least by which top_p can differ
STEPS = {3: 0, 127: -1, 200: -2, 299: -2}
LEVELS = {0: -1, 3: 0, 127: -1, 128: -1, 200: -1, 299: 0}
HALVES = {i: -int(i % 3 != 1) for i in range(VOCAB)}  # 100 tokens, and 200 of half their weight
EQUAL = dict.fromkeys(range(VOCAB), 5)
EDGE = {3: 0, 128: -28, 299: -29}  # weights 2**28, 1 and 0
ENDS = {
    "all": (STEPS, {}),
    "top-k before a tie": (LEVELS, {"top_k": 2}),
    "top-k within a tie": (LEVELS, {"top_k": 4}),
    "top-k after a tie": (LEVELS | {299: -2}, {"top_k": 5}),
    "top-k between ties that do not fit": (HALVES, {"top_k": 100}),
    "top-k of equals": (EQUAL, {"top_k": 150}),
    "top-k of one less than all": (EQUAL, {"top_k": VOCAB - 1}),
    "top-k of as many as fit": ({3: 0} | dict.fromkeys(range(60, 92), -1), {"top_k": 20}),
    "top-p of the first": (STEPS, {"top_p": 0.5}),
    "top-p before a tie": (STEPS, {"top_p": 0.75}),
    "top-p within a tie": (STEPS, {"top_p": 0.75 + MORE}),
    "top-p between ties that do not fit": (HALVES, {"top_p": 0.5}),
    "top-p at the end of one of equals": (EQUAL, {"top_p": 0.5}),
    "top-p just after it": (EQUAL, {"top_p": 0.5 + MORE}),
    "top-p of what top-k keeps": (LEVELS, {"top_k": 4, "top_p": 2 / 3}),
    "min-p of a logit": (STEPS | {298: -3}, {"min_p": 0.25}),
    "min-p at the end of top-k": (LEVELS, {"top_k": 4, "min_p": 0.5}),
    "min-p of the largest": (LEVELS, {"min_p": 1.0}),
    "min-p beside top-p": (STEPS, {"top_p": 0.75 + MORE, "min_p": 0.25}),
    "the smallest weight": (EDGE, {}),
    "the smallest weight, top-k": (EDGE, {"top_k": 2}),
    "the smallest weight, top-p": (EDGE, {"top_p": 1 - MORE}),
    "the smallest weight, min-p": (EDGE, {"min_p": 2**-28}),
}


def seed_of(bits, position):
    """The seed whose 53 random bits at ``position`` are ``bits``: SplitMix64 backwards."""

    def unshift(x, n):
        y = x
        for _ in range(64 // n):
            y = x ^ (y >> n)
        return y

    x = unshift(bits << 11, 31)
    for factor, shift in ((0x94D049BB133111EB, 27), (0xBF58476D1CE4E5B9, 30)):
        x = unshift(x * pow(factor, -1, 1 << 64) % (1 << 64), shift)
    return (x - (position + 1) * 0x9E3779B97F4A7C15) % (1 << 64)


def cases():
    """Each end with draws on both sides of where the tokens meet: rows, parameters, positions, histories, ids."""
    rows, params, positions, expected = [], [], [], []
    for logits, options in ENDS.values():
        row = torch.full((VOCAB,), -60.0)
        row[list(logits)] = torch.tensor(list(logits.values()), dtype=torch.float32)
        kept = kept_by_definition(row, SamplingParams(TEMPERATURE, **options), ([], []))
        sums, total = list(itertools.accumulate(kept.values())), sum(kept.values())
        draws = {(1 << 53) - 1: len(kept) - 1}
        if (i := len(kept) - 1) > 0:
            first = -((-sums[i - 1] << 53) // total)  # of the bits that draw the last token
            draws |= {first: i, first - 1: i - 1}
        for bits, i in draws.items():
            position = 7 * len(rows)
            params.append(SamplingParams(TEMPERATURE, seed=seed_of(bits, position), **options))
            assert random_bits(params[-1].seed, position) == bits
            rows.append(row)
            positions.append(position)
            expected.append(list(kept)[i])
    return (torch.stack(rows), params, positions, [([], [])] * len(rows)), expected


def test_the_reference_and_the_cpu_kernel_end_where_float64_does(cpu_sampler):
    arguments, expected = cases()
    assert reference(*arguments)[0] == expected
    assert on_cpu(cpu_sampler, *arguments)[0] == expected


@pytest.mark.parametrize("programs", quick([1, 2], 1))
def test_the_gpu_kernel_ends_where_float64_does(request, device, monkeypatch, programs):
    from llama_engine.kernels import sampler

    if programs > 1:
        request.getfixturevalue("split")(programs)
    for name, value in (("WARPS", 1), ("PARTS", 4), ("CANDIDATES", 32)):
        monkeypatch.setattr(sampler, name, value)
    arguments, expected = cases()
    if device.type == "cpu":  # interpreted, two draws a second
        half = slice(programs - 1, None, 2)
        arguments, expected = tuple(part[half] for part in arguments), expected[half]
    assert on_gpu(*arguments, device)[0] == expected
