"""What the launch of every Triton-language kernel needs to know about the device."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of every kernel launch on ``device``: programmatic dependent launch from sm_90 on.

    With it a kernel's blocks become resident, and may touch weights, while its predecessor still runs; each kernel
    waits for its predecessor before it touches anything else.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one block may use on ``device``; plenty in the interpreter."""
    if device.type != "cuda":
        return 1 << 20
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of ``device``; the interpreter counts as one of them."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def has_e4m3(device: torch.device) -> bool:
    """Whether kernels on ``device`` can convert e4m3: from Ada (sm89) on, and in the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
