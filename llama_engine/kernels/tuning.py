"""Which tile each matrix uses for how many rows: defaults, tuned choices, and their JSON form."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from llama_engine.errors import InputError
from llama_engine.kernels.gemm import Tile, fit
from llama_engine.weights import Linear

FORMAT_VERSION = 1
ROW_BUCKETS = (16, 32, 64, 128)  # up to so many rows; the last one also stands for every larger number


def row_bucket(num_rows: int) -> int:
    """The tile bucket of a batch of ``num_rows``."""
    return next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), ROW_BUCKETS[-1])


def default_tile(name: str, num_rows: int) -> Tile:
    """Good tiles on an H100 for a matrix called ``name`` (qkv, o, gate_up, down or lm_head)."""
    bucket = row_bucket(num_rows)
    if bucket == 128:
        return Tile(m=128, n=128, k=128, swap=False, warps=8, stages=3)
    return Tile(m=bucket, n=64, k=128, swap=True, warps=4, stages=4)


class Tiles:
    """The tiles of one engine: tuned for this GPU where they were, else defaults."""

    def __init__(self, tuning: dict[str, Any] | None, gpu: str) -> None:
        self._chosen: dict[tuple[str, int], Tile] = {}
        if tuning is None:
            return
        if tuning.get("format_version") != FORMAT_VERSION or tuning.get("gpu") != gpu:
            warnings.warn(
                f"the engine's tuning is for {tuning.get('gpu')!r}, this GPU is {gpu!r}: running untuned", stacklevel=2
            )
            return
        for key, values in tuning["tiles"].items():
            name, _, bucket = key.partition("/")
            try:
                self._chosen[name, int(bucket)] = Tile(**values)
            except (TypeError, ValueError) as error:
                raise InputError(f"tuning.json: {key}: {error}; build the engine again") from None

    def get(self, name: str, linear: Linear, num_rows: int) -> Tile:
        """The tile for ``num_rows`` rows of ``linear``."""
        tile = self._chosen.get((name, row_bucket(num_rows))) or default_tile(name, num_rows)
        return fit(tile, linear, num_rows)


def gpu_name(device: torch.device) -> str:
    """What a tuning belongs to."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
