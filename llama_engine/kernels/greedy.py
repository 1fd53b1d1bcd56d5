# ruff: noqa: ANN001, ANN202 (Triton kernels take untyped pointers)
"""The end of a step: greedy tokens from the tiles' maxima, and the slots' next state, all on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_engine.kernels.common import launch_options


@triton.jit
def _greedy(
    best_ptr,
    index_ptr,
    sampled_ptr,
    slots_ptr,
    last_ptr,
    position_ptr,
    next_ptr,
    num_tiles,
    dummy,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    offs = tl.arange(0, BLOCK)
    mask = offs < num_tiles
    best = tl.load(best_ptr + row * num_tiles + offs, mask=mask, other=float("-inf"))
    top, tile = tl.max(best, axis=0, return_indices=True)
    token = tl.load(index_ptr + row * num_tiles + tile)
    token = tl.where(tl.abs(top) < float("inf"), token, -1)
    slot = tl.load(slots_ptr + row)
    tl.store(sampled_ptr + row, token)
    if slot != dummy:
        tl.store(last_ptr + slot, tl.maximum(token, 0))  # the next step may be on its way before the host reads this
        if ADVANCE:
            tl.store(position_ptr + slot, tl.load(position_ptr + slot) + 1)
        else:
            tl.store(position_ptr + slot, tl.load(next_ptr + row))


def greedy(
    partials: tuple[torch.Tensor, torch.Tensor],
    num_tiles: int,
    sampled: torch.Tensor,
    slots: torch.Tensor,
    last_token: torch.Tensor,
    position: torch.Tensor,
    num_rows: int,
    next_position: torch.Tensor | None = None,
) -> None:
    """Greedy tokens from the tiles' maxima (the lowest id wins a tie), and the slots' next state.

    ``sampled[r]`` int32; ``last_token[slots[r]]`` becomes it, ``position[slots[r]]`` advances by one or becomes
    ``next_position[r]``. The last slot is the padding's and stays as it is. A row whose maximum is infinite samples
    :data:`llama_engine.sampling.NOT_FINITE`, and its ``last_token`` becomes 0.
    """
    block = triton.next_power_of_2(num_tiles)
    _greedy[(num_rows,)](
        *partials,
        sampled,
        slots,
        last_token,
        position,
        next_position,
        num_tiles,
        last_token.shape[0] - 1,
        ADVANCE=next_position is None,
        BLOCK=block,
        **launch_options(sampled.device),
    )
