# ruff: noqa: ANN001, ANN201 (Triton kernels take untyped pointers)
"""The sampler's arithmetic: logits as ordered keys and as integer weights, shares of sums, random bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(x):
    """int32 in the order of ``x``; equal for 0 and -0, the largest for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(key == -1, 0, key)
    return tl.where(x == x, key, 0x7FFFFFFF)


@triton.jit
def value_of(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, largest, scale):
    """sampling.weights, int32; nonsense for NaN."""
    t = tl.maximum((x - largest) * scale, -40.0)
    shifted = t + 12582940.0
    f = t - (shifted - 12582940.0)
    p = f * 0.0013264723820611835
    p = (p + 0.009671512991189957) * f
    p = (p + 0.05550733581185341) * f
    p = (p + 0.24022242426872253) * f
    p = (p + 0.6931470036506653) * f
    p = p + 1.0
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True).to(tl.int32)


@triton.jit
def least_key(largest, scale, floor):
    """The key, int64, of the smallest logit with t >= ``floor``."""
    above = key_of(largest).to(tl.int64)
    below = tl.full([], -0x7F800001, tl.int64)  # -inf
    while above - below > 1:
        middle = below + (above - below) // 2
        enough = (value_of(middle) - largest) * scale >= floor
        above = tl.where(enough, middle, above)
        below = tl.where(enough, below, middle)
    return above


@triton.jit
def share_of(amount, total):
    """``amount`` * ``total`` * 2**-30, rounded up, within 64 bits."""
    share = amount.to(tl.int64)
    low = share * (total & 0xFFFFFF) + 0x3FFFFFFF
    return (share * (total >> 24) + (low >> 24)) >> 6


@triton.jit
def random_bits(low, high, position):
    """sampling.random_bits, int64."""
    seed = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    x = seed.to(tl.uint64) + (position.to(tl.int64) + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) >> 11).to(tl.int64)
