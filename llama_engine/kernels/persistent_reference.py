"""The persistent decode kernel, step by step in plain PyTorch: what ``persistent.cu`` computes, in its order.

Read :func:`decode` beside ``consume`` in ``persistent.cu``: one function here is one stage there, and names the file
and the functions that do it. The arithmetic is the kernel's (digits, e4m3, exact integer sums, 24-bit words between
blocks, a softmax in parts), so only the order of floating-point sums differs. Left out is what makes it fast and
changes no value: the ring of weights that a producer thread fills ahead of time, the flags that say a word has arrived,
the order of activations in memory (``Split``), and the split of a row's sum over eight warps.

Activations are what the layers' weights are multiplied with (:data:`Inputs`): 16-bit fixed point in two digits for INT8
and INT4, e4m3 for FP8, as in batches of any size.

Blocks are a loop here, ``grid`` of them. Any geometry runs, on any device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_engine.config import ModelConfig
from llama_engine.model.rope import rope_tables
from llama_engine.model.schemes import DIGITS_MAX, FP8, INT4, INT8, Scheme, quantize_e4m3, unpack_int4
from llama_engine.model.weights import EngineWeights, Linear

NONE = -1e30  # the score of a share of the context that holds no positions


@dataclass(frozen=True)
class Digits:
    """Activations ``[rows, K]`` as ``(256 * high + low) * scale``, with integer digits in float64 (exact)."""

    high: Tensor
    low: Tensor
    scale: Tensor  # float32 [rows]


@dataclass(frozen=True)
class Halves:
    """Activations ``[rows, K]`` as e4m3 ``value * scale``. ``Halves`` in persistent_matrix.cuh."""

    value: Tensor
    scale: Tensor  # float32 [rows]


Inputs = Digits | Halves


def decode(
    config: ModelConfig,
    weights: EngineWeights,
    kv: Sequence[Tensor],
    slot_ids: Tensor,
    last_token: Tensor,
    position: Tensor,
    block_tables: Tensor,
    *,
    grid: int = 4,
) -> tuple[Tensor, Tensor]:
    """One token for each of ``slot_ids``: sampled ids int64 ``[rows]`` and logits float32 ``[rows, vocab]``.

    Arguments as for :meth:`llama_engine.kernels.persistent.PersistentDecode.launch`: ``kv`` gets the new keys and
    values, ``last_token`` and ``position`` move on. The last slot is the padding's and stays as it is.
    """
    state = (slot_ids, last_token, position, block_tables)
    return decode_split(config, [weights], [kv], *state, grid=grid)


def decode_split(
    config: ModelConfig,
    ranks: Sequence[EngineWeights],
    caches: Sequence[Sequence[Tensor]],
    slot_ids: Tensor,
    last_token: Tensor,
    position: Tensor,
    block_tables: Tensor,
    *,
    grid: int = 4,
) -> tuple[Tensor, Tensor]:
    """:func:`decode` of tensor-parallel ``ranks``, of whose share ``config`` speaks, each with its own cache. Where the
    residual is added, a block also takes its namesakes' sums, in the order of ranks, as whole float32:
    ``add_residual`` in persistent.cu."""
    slots, eps = slot_ids.long(), config.rms_norm_eps
    past = position[slots].tolist()
    residual = embed(ranks[0], last_token[slots])
    x = residual  # the embedding is read by every block itself; from here on blocks exchange words
    scheme = ranks[0].layers[0].qkv.scheme
    for i in range(config.num_layers):
        sums = []
        for layer, cache in ((weights.layers[i], kv[i]) for weights, kv in zip(ranks, caches)):
            qkv = word(matrix(norm_inputs(x, layer.input_norm, eps, scheme), layer.qkv, grid, turn=i))
            attended = word(attend(config, qkv, cache, block_tables[slots], past, grid))
            sums.append(matrix(plain_inputs(attended, scheme), layer.o, grid))
        residual = functools.reduce(Tensor.add, sums, residual)
        x, sums = word(residual), []
        for layer in (weights.layers[i] for weights in ranks):
            hidden = word(gate_up(norm_inputs(x, layer.post_norm, eps, scheme), layer.gate_up, grid, turn=i))
            sums.append(matrix(plain_inputs(hidden, scheme), layer.down, grid))
        residual = functools.reduce(Tensor.add, sums, residual)
        x = word(residual)
    logits = torch.cat([lm_head(x, weights, eps, grid) for weights in ranks], dim=-1)
    sampled = greedy(logits, slots, last_token, position)
    return sampled, logits


# -- how the work is divided ------------------------------------------------------------------------------------------


def part_of(block: int, n: int, turn: int, grid: int) -> range:
    """The rows of an ``n``-row matrix that ``block`` owns. ``part_of`` in persistent_stream.cuh.

    Rows are split evenly; where ``grid`` does not divide ``n``, which blocks own one row more rotates with the layer
    (``turn``), so that over a token every block streams about the same number of bytes. The rows of ``o`` and ``down``
    do not rotate (turn 0): a block keeps its rows of the residual in registers.
    """
    each, more = divmod(n, grid)
    first = turn * more % grid  # the first block with a row more; the others follow it, around the end of the grid
    longer = {(first + i) % grid for i in range(more)}
    start = block * each + sum(other < block for other in longer)
    return range(start, start + each + (block in longer))


def splits_of(config: ModelConfig, rows: int, grid: int) -> int:
    """How many blocks share the context of one KV head of one row, a power of two. ``SPLITS``, ``power_of_two`` in
    persistent_stream.cuh."""
    return 1 << max(0, (grid // (config.num_kv_heads * rows)).bit_length() - 1)


def positions_of(split: int, splits: int, past: int) -> range:
    """The cached positions in ``split`` of a context of ``past`` tokens, in units of 8. ``unit_of`` in
    persistent_stream.cuh. The new token is not among them: the last split adds it."""
    each = (-(-past // splits) + 7) // 8 * 8
    return range(min(split * each, past), min((split + 1) * each, past))


# -- what blocks exchange ---------------------------------------------------------------------------------------------


def word(x: Tensor) -> Tensor:
    """float32 as it arrives in another block: its upper 24 bits, rounded. ``send``, ``received`` in
    persistent_matrix.cuh. The low byte of the word is the flag by which a reader knows that it has arrived."""
    rounded = ((x.contiguous().view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)
    return torch.where(torch.isnan(x), x, rounded)


# -- the stages of a layer --------------------------------------------------------------------------------------------


def embed(weights: EngineWeights, tokens: Tensor) -> Tensor:
    """The residual stream's start, float32 ``[rows, hidden]``. The first loop of ``consume`` in persistent.cu."""
    return weights.embedding[tokens.long()].float()


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` times the norm's weight, and the factor 1 / RMS of each row, applied later. ``normalize`` in
    persistent_matrix.cuh."""
    return x * weight.float(), torch.rsqrt(x.pow(2).mean(-1) + eps)


def to_digits(x: Tensor, amax: Tensor, scale: Tensor) -> Digits:
    """Fixed point, rounded to nearest even, in two signed digits. ``to_fixed``, ``pack``, ``inverse_of`` in
    persistent_matrix.cuh."""
    inverse = torch.where(amax > 0, DIGITS_MAX / amax, 0.0)
    fixed = (x.double() * inverse.double()[:, None]).round()
    high = ((fixed + 128) / 256).floor()
    return Digits(high, fixed - 256 * high, scale)


def to_e4m3(x: Tensor) -> Halves:
    """e4m3 with one scale a row. ``Halves``, ``round_e4m3`` in persistent_matrix.cuh."""
    return Halves(*quantize_e4m3(x))


def norm_inputs(x: Tensor, weight: Tensor, eps: float, scheme: Scheme) -> Inputs:
    """A normalized row as ``scheme`` is multiplied with it; in fixed point its 1 / RMS goes into the scale.
    ``norm_inputs`` in persistent_matrix.cuh."""
    v, rstd = normalize(x, weight, eps)
    if scheme is FP8:
        return to_e4m3(v * rstd[:, None])
    amax = v.abs().amax(-1)
    return to_digits(v, amax, amax * rstd / DIGITS_MAX)


def plain_inputs(x: Tensor, scheme: Scheme) -> Inputs:
    """A row as ``scheme`` is multiplied with it: the input of ``o`` and ``down``. ``plain_inputs`` in
    persistent_matrix.cuh."""
    if scheme is FP8:
        return to_e4m3(x)
    amax = x.abs().amax(-1)
    return to_digits(x, amax, amax / DIGITS_MAX)


def gemv(d: Inputs, linear: Linear, rows: slice) -> Tensor:
    """float32 ``[rows of the batch, rows of the matrix]``. ``gemv``, ``take`` in persistent_gemv.cuh.

    Of INT8 both digits' sums are exact and scaled once; of INT4 exact over each group, then added in float32 (in
    float64 here); products of e4m3 are exact and added in float32 (in float64 here).
    """
    if isinstance(d, Halves):
        sums = d.value.double() @ linear.weight[rows].double().T
        return sums.float() * d.scale[:, None] * linear.scale[rows]
    if linear.scheme is INT4:
        group = linear.group
        weight = unpack_int4(linear.weight[rows], group).double().unflatten(1, (-1, group))
        groups = torch.einsum("rgk,ngk->rng", (256 * d.high + d.low).unflatten(1, (-1, group)), weight)
        return (groups * linear.scale[rows].double()).sum(-1).float() * d.scale[:, None]
    weight = linear.weight[rows].double()  # every product and sum below 2^53, so exact
    high, low = d.high @ weight.T, d.low @ weight.T
    return (high.float() * 256 + low.float()) * d.scale[:, None] * linear.scale[rows]


def matrix(d: Inputs, linear: Linear, grid: int, turn: int = 0) -> Tensor:
    """A whole matrix, each block its own rows. The calls of ``gemv`` in ``consume`` in persistent.cu."""
    parts = (part_of(block, linear.weight.shape[0], turn, grid) for block in range(grid))
    return torch.cat([gemv(d, linear, slice(part.start, part.stop)) for part in parts], dim=-1)


def gate_up(d: Inputs, linear: Linear, grid: int, turn: int) -> Tensor:
    """SiLU(gate) * up: a block owns pairs, gate row ``j`` with up row ``j``. The call of ``gemv`` with PAIRED in
    ``consume`` in persistent.cu."""
    n, out = linear.weight.shape[0] // 2, []
    for block in range(grid):
        part = part_of(block, n, turn, grid)
        gate = gemv(d, linear, slice(part.start, part.stop))
        up = gemv(d, linear, slice(n + part.start, n + part.stop))
        out.append(gate / (1 + torch.exp(-gate)) * up)
    return torch.cat(out, dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of heads ``[n, head_size]`` at one position. ``rotate`` in persistent_attention.cuh."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(config: ModelConfig, qkv: Tensor, cache: Tensor, tables: Tensor, past: Sequence[int], grid: int) -> Tensor:
    """float32 ``[rows, q_size]``: every unit (row, KV head, split) attends to its share of the context, then the splits
    of a head are merged. ``attend`` in persistent_attention.cuh. ``cache`` gets the new key and value, in fp16."""
    c, splits = config, splits_of(config, len(past), grid)
    group, out = c.num_heads // c.num_kv_heads, []
    for row, length in enumerate(past):
        cos, sin = (table[length].to(qkv.device) for table in rope_tables(c, length + 1))
        q, k, v = (part.view(-1, c.head_size) for part in qkv[row].split((c.q_size, c.kv_size, c.kv_size)))
        q = rotate(q, cos, sin) * (math.log2(math.e) / math.sqrt(c.head_size))  # scores are powers of two
        block, at = int(tables[row, length // cache.shape[3]]), length % cache.shape[3]
        cache[0, block, :, at], cache[1, block, :, at] = rotate(k, cos, sin).half(), v.half()
        for head in range(c.num_kv_heads):
            units = []
            for split in range(splits):
                share = [*positions_of(split, splits, length), *([length] if split == splits - 1 else [])]
                units.append(unit(q[head * group : (head + 1) * group], cache[:, :, head], tables[row], share))
            out.append(merge(units))
    return torch.cat(out).view(len(past), c.q_size)


def unit(q: Tensor, cache: Tensor, table: Tensor, share: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """One block's part of a softmax over the positions in ``share``: the weighted values ``[group, head_size]``, the
    score they refer to and the weights' sum ``[group]``, all as words. ``Softmax`` in persistent_attention.cuh.

    The score is a whole number near the largest one, which a word holds exactly.
    """
    if not share:
        top = torch.full(q.shape[:1], NONE, device=q.device)
        return torch.zeros_like(q), word(top), torch.zeros_like(top)
    at = torch.tensor(share, device=q.device)
    keys, values = cache[:, table[at // cache.shape[2]].long(), at % cache.shape[2]].float()
    scores = q @ keys.T
    top = scores.amax(-1).round()
    weights = torch.exp2(scores - top[:, None])
    return word(weights @ values), word(top), word(weights.sum(-1))


def merge(units: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The splits of one head's context put together, ``[group, head_size]``. The end of ``attend`` in
    persistent_attention.cuh."""
    values, tops, sums = (torch.stack(parts) for parts in zip(*units))
    weights = torch.exp2(tops - tops.amax(0))
    return (weights[..., None] * values).sum(0) / (weights * sums).sum(0)[:, None]


# -- the end of a token -----------------------------------------------------------------------------------------------


def lm_head(x: Tensor, weights: EngineWeights, eps: float, grid: int) -> Tensor:
    """Logits float32 ``[rows, vocab]``: an INT8 lm_head like any matrix, an fp16 one in float32. The end of
    ``consume`` in persistent.cu."""
    if weights.lm_head.scheme is INT8:
        return matrix(norm_inputs(x, weights.final_norm, eps, INT8), weights.lm_head, grid)
    v, rstd = normalize(x, weights.final_norm, eps)
    return v @ weights.lm_head.weight.float().T * rstd[:, None]


def greedy(logits: Tensor, slots: Tensor, last_token: Tensor, position: Tensor) -> Tensor:
    """The largest logit's id (the lowest wins a tie), and the slots' next state, int64 ``[rows]``. The last block of
    ``consume`` in persistent.cu."""
    sampled = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    for token, slot in zip(sampled.tolist(), slots.tolist()):
        if slot != len(last_token) - 1:
            last_token[slot] = token
            position[slot] += 1
    return sampled
