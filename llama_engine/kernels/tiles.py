"""The table of tiles: which one each matrix uses for how many rows, defaults or what the tuner stored."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from llama_engine.errors import InputError
from llama_engine.kernels import library
from llama_engine.kernels.gemm import Tile, fit
from llama_engine.model.schemes import INT4, INT8, Scheme
from llama_engine.model.weights import Linear

FORMAT_VERSION = 2
TUNING_FILE = "tuning.json"
ROW_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024)  # up to so many rows; the last also stands for all larger numbers
# Ways along K in a bucket: from 128 rows on tiles are 128 wide, and narrow matrices have fewer than an H100 has units.
SPLITS = {128: {"down": 4, "o": 4, "qkv": 2}, 256: {"down": 2, "o": 2}}


def row_bucket(num_rows: int) -> int:
    """The tile bucket of a batch of ``num_rows``."""
    return next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), ROW_BUCKETS[-1])


def default_tile(name: str, num_rows: int, scheme: Scheme = INT8, use_library: bool = False) -> Tile:
    """Good tiles on an H100 for a matrix called ``name`` (qkv, o, gate_up, down or lm_head).

    ``use_library``: cuBLAS takes the matrix, and shall where it has many rows.
    """
    bucket = row_bucket(num_rows)
    if name == "lm_head":
        # Never below 16 rows: another matrix instruction would add in another order.
        return Tile(128, 128, 64, warps=8) if bucket >= 128 else Tile(max(16, bucket), 128, 128)
    if bucket >= 1024 and scheme is INT8:
        return Tile(64, 256, 128, swap=False, warps=8, stages=3)
    if bucket >= 128 and scheme is INT8:
        return Tile(128, 128, 128, SPLITS.get(bucket, {}).get(name, 1), swap=False, warps=8, stages=3)
    if scheme is INT4:  # swapped, so that the weights, which are widened in registers, may stay there
        if bucket >= 128:
            return Tile(128, 128, 128, warps=8, stages=3, library=use_library and bucket >= 512)
        return Tile(max(16, bucket), 64, 128, split=2 if name in ("o", "down") else 1, stages=8)
    if bucket >= 128:
        return Tile(128, 128, 128 // scheme.weight_dtype.itemsize, swap=False, warps=8, library=use_library)
    if scheme is not INT8:
        bucket = max(16, bucket)  # with fewer rows Triton takes older matrix instructions, and widens e4m3 for them
    if bucket >= 32:
        gate_up = Tile(64, 64, 128) if bucket == 64 else Tile(32, 128, 256)
        return {"gate_up": gate_up, "down": Tile(bucket, 64, 256, 2)}.get(name, Tile(bucket, 64, 256))
    k = 512 // scheme.weight_dtype.itemsize
    return Tile(bucket, 64, k, split=4 if name == "down" else 1, stages=3)


class Tiles:
    """The tiles of one engine: tuned for this GPU where they were, else defaults."""

    def __init__(self, tuning: dict[str, Any] | None, gpu: str) -> None:
        self._chosen: dict[tuple[str, str, int], Tile] = {}
        self._fitted: dict[tuple[str, str, int], Tile] = {}
        if tuning is None:
            return
        if tuning.get("format_version") != FORMAT_VERSION:
            warnings.warn("the engine's tuning is of another version: build it again; running untuned", stacklevel=2)
            return
        if tuning.get("gpu") != gpu:
            warnings.warn(
                f"the engine's tuning is for {tuning.get('gpu')!r}, this GPU is {gpu!r}: running untuned", stacklevel=2
            )
            return
        for key, values in tuning["tiles"].items():
            try:
                name, scheme, bucket = key.split("/")
                self._chosen[name, scheme, int(bucket)] = Tile(**values)
            except (TypeError, ValueError) as error:
                raise InputError(f"{TUNING_FILE}: {key}: {error}; build the engine again") from None

    def set(self, name: str, scheme: Scheme, bucket: int, tile: Tile) -> None:
        """Use ``tile`` for the bucket's rows of matrices of this name and scheme from now on."""
        self._chosen[name, scheme.name, bucket] = tile
        self._fitted.clear()

    def chosen(self, name: str, scheme: Scheme, bucket: int) -> Tile | None:
        """What was tuned or set for the bucket, None where the default stands."""
        return self._chosen.get((name, scheme.name, bucket))

    def get(self, name: str, linear: Linear, num_rows: int) -> Tile:
        """The tile for ``num_rows`` rows of ``linear``, the engine's matrix called ``name``."""
        if name == "lm_head":
            num_rows = max(16, num_rows)
        scheme = linear.scheme
        tile = self._fitted.get((name, scheme.name, num_rows))
        if tile is None:
            tile = self.chosen(name, scheme, row_bucket(num_rows))
            tile = tile or default_tile(name, num_rows, scheme, library.runs(linear))
            tile = self._fitted[name, scheme.name, num_rows] = fit(tile, linear, num_rows)
        return tile


def gpu_name(device: torch.device) -> str:
    """What a tuning belongs to."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def load_tuning(engine_dir: Path) -> dict[str, Any] | None:
    """The engine's tuning, or None if it has none. Raises :class:`InputError` for a damaged file."""
    path = Path(engine_dir) / TUNING_FILE
    if not path.is_file():
        return None
    try:
        tuning = json.loads(path.read_text())
        return {"tiles": {}} | tuning
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged: delete it to run untuned, or build the engine again") from None
