"""Which tile each matrix uses for how many rows: defaults, choices timed on the GPU at hand, and their JSON form."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from llama_engine.errors import InputError
from llama_engine.kernels.gemm import Tile, fit
from llama_engine.weights import LINEARS, Linear

if TYPE_CHECKING:
    from llama_engine.gpu_model import GpuModel

FORMAT_VERSION = 1
TUNING_FILE = "tuning.json"
ROW_BUCKETS = (8, 16, 32, 64, 128)  # up to so many rows; the last one also stands for every larger number
TUNED_ROWS = {8: 8, 16: 16, 32: 32, 64: 64, 128: 1024}  # how many rows a bucket is timed with


def row_bucket(num_rows: int) -> int:
    """The tile bucket of a batch of ``num_rows``."""
    return next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), ROW_BUCKETS[-1])


def default_tile(name: str, num_rows: int) -> Tile:
    """Good tiles on an H100 for a matrix called ``name`` (qkv, o, gate_up, down or lm_head)."""
    bucket = row_bucket(num_rows)
    if name == "lm_head":
        # Never below 16 rows: another matrix instruction would add in another order.
        return Tile(max(16, min(bucket, 64)), 128 if bucket > 16 else 64, 128, stages=3 if bucket > 16 else 4)
    if bucket == 128:
        return Tile(64, 256, 128, swap=False, warps=8, stages=3)
    if bucket == 64:
        return {
            "o": Tile(64, 32, 256),
            "down": Tile(64, 32, 256),
            "gate_up": Tile(64, 64, 128),
        }.get(name, Tile(64, 64, 256))
    if bucket == 32:
        return {
            "down": Tile(32, 64, 128, 4, stages=5),
            "gate_up": Tile(32, 64, 128, stages=5),
        }.get(name, Tile(32, 64, 256))
    return Tile(bucket, 64, 256, split=4 if name == "down" else 1)


def candidates(name: str, bucket: int) -> list[Tile]:
    """Tiles worth timing for a matrix and a row bucket, the default first."""
    tiles = [default_tile(name, bucket)]
    if bucket == 128:
        shapes = itertools.product(((64, 256), (128, 128)), (3, 4), (False, True))
        tiles += [Tile(m, n, 128, 1, False, 8, stages, tma=tma) for (m, n), stages, tma in shapes]
    elif name == "lm_head":
        tiles += [replace(tiles[0], n=n, stages=stages) for n, stages in itertools.product((64, 128), (3, 4))]
    else:
        splits = (1, 4) if name in ("o", "down") else (1,)
        shapes = itertools.product((32, 64), ((128, 5), (256, 4)), splits)
        tiles += [Tile(bucket, n, k, split, stages=stages) for n, (k, stages), split in shapes]
    return tiles


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
                raise InputError(f"{TUNING_FILE}: {key}: {error}; build the engine again") from None

    def get(self, name: str, linear: Linear, num_rows: int) -> Tile:
        """The tile for ``num_rows`` rows of ``linear``."""
        if name == "lm_head":
            num_rows = max(16, num_rows)
        tile = self._chosen.get((name, row_bucket(num_rows))) or default_tile(name, num_rows)
        return fit(tile, linear, num_rows)


def gpu_name(device: torch.device) -> str:
    """What a tuning belongs to."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def time_graph(run: Callable[[], None], repeats: int = 3) -> float:
    """Milliseconds of one replay of ``run`` captured into a CUDA graph: the fastest of ``repeats``."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    times = []
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph.capture_begin()
        run()
        graph.capture_end()
        graph.replay()
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return min(times)


def tune(
    model: GpuModel,
    progress: Callable[[str], None] = lambda _: None,
    choices: Callable[[str, int], Iterable[Tile]] = candidates,
) -> dict[str, Any]:
    """Time the candidates of every matrix and row bucket on the model's own weights; the dict of tuning.json."""
    work = []
    for name, bucket in itertools.product((*LINEARS, "lm_head"), ROW_BUCKETS):
        rows = TUNED_ROWS[bucket]
        if (name == "lm_head" and bucket in (8, 128)) or rows > model.x.shape[0]:
            continue
        linear = model.linears(name)[0]
        work.append(
            (name, bucket, rows, list(dict.fromkeys(fit(tile, linear, rows) for tile in choices(name, bucket))))
        )
    progress(f"compiling {sum(len(tiles) for *_, tiles in work)} kernels")
    pool = ThreadPoolExecutor(os.cpu_count())
    mode = getattr(triton, "AsyncCompileMode", None)
    with pool, mode(pool, ignore_errors=True) if mode else contextlib.nullcontext():
        for name, _, rows, tiles in work if mode else ():
            for tile in tiles:
                model.run_linear(name, 0, rows, tile, compile_only=True)
    best: dict[str, Any] = {}
    timings: dict[str, Any] = {}
    for name, bucket, rows, tiles in work:
        progress(f"timing {name}, {rows} rows")
        count = len(model.linears(name)) if name != "lm_head" else 4
        timed = []
        for tile in tiles:
            try:
                run = lambda t=tile: [model.run_linear(name, i, rows, t) for i in range(count)]  # noqa: B023, E731
                timed.append((time_graph(run) / count, tile))
            except (triton.runtime.OutOfResources, triton.CompilationError, RuntimeError):
                continue  # too large for this GPU's shared memory or registers
        timed.sort(key=lambda pair: pair[0])
        best[f"{name}/{bucket}"] = timed[0][1].to_dict()
        timings[f"{name}/{bucket}"] = [(round(1e3 * ms, 2), tile.to_dict()) for ms, tile in timed]
    return {"format_version": FORMAT_VERSION, "gpu": gpu_name(model.device), "tiles": best, "microseconds": timings}


def save_tuning(engine_dir: Path, tuning: dict[str, Any]) -> None:
    """Write ``tuning.json`` beside the engine."""
    path = Path(engine_dir) / TUNING_FILE
    partial = path.with_suffix(".partial")
    kept = {key: value for key, value in tuning.items() if key != "microseconds"}
    partial.write_text(json.dumps(kept, indent=1))
    os.replace(partial, path)


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
