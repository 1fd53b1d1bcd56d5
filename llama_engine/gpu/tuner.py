"""Choose tiles on the GPU at hand, by the time of whole steps, and store them in the engine directory."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton

from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError, RunError
from llama_engine.files import write_text
from llama_engine.gpu.chain import GpuModel
from llama_engine.kernels import library
from llama_engine.kernels.gemm import LM_HEAD_ROWS, Tile, fit
from llama_engine.kernels.tiles import (
    FORMAT_VERSION,
    ROW_BUCKETS,
    TUNING_FILE,
    Tiles,
    default_tile,
    gpu_name,
    load_tuning,
)
from llama_engine.model.schemes import INT4, INT8
from llama_engine.model.weights import Linear, load_weights


def candidates(name: str, bucket: int, linear: Linear) -> list[Tile]:
    """Tiles worth timing for a matrix and a row bucket, the default first."""
    use_library = name != "lm_head" and library.runs(linear)
    tiles = [default_tile(name, bucket, linear.scheme, use_library)]
    if bucket >= 64 and use_library:
        tiles += [replace(tiles[0], library=not tiles[0].library)]
    if name == "lm_head" and bucket >= 128:
        tiles += [Tile(64, 128, 128), Tile(64, 256, 64, warps=8), Tile(128, 128, 64, warps=8, stages=3)]
    elif bucket >= 128:
        k = 128 // linear.scheme.weight_dtype.itemsize
        splits = (1,) if name == "gate_up" or bucket >= 1024 else (1, 2, 4) if bucket == 128 else (1, 2)
        shapes = [(64, 256, 8, 3), (64, 128, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4)]
        if linear.scheme not in (INT8, INT4):
            shapes += [(64, 256, 8, 4), (128, 256, 8, 3), (128, 256, 8, 4)]
        swap = linear.scheme is INT4
        tiles += [Tile(m, n, k, way, swap, w, s) for (m, n, w, s), way in itertools.product(shapes, splits)]
        if bucket == 128:
            tiles += [Tile(m, n, k, way) for m, n, way in itertools.product((64, 128), (64, 128), splits)]
    elif name == "lm_head":
        tiles += [replace(tiles[0], n=n, stages=stages) for n, stages in itertools.product((64, 128), (3, 4))]
    else:
        splits = {"gate_up": (1,), "down": (1, 2, 4)}.get(name, (1, 2))
        steps = ((128, 5), (128, 8)) if linear.scheme is INT4 else ((128, 5), (256, 4), (512, 3))
        shapes = itertools.product((32, 64, 128), steps, splits)
        tiles += [Tile(tiles[0].m, n, k, split, stages=stages) for n, (k, stages), split in shapes]
    return tiles


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
    choices: Callable[[str, int, Linear], Iterable[Tile]] = candidates,
) -> dict[str, Any]:
    """Choose the tiles of every matrix, in each of its schemes, and row bucket; the dict of tuning.json.

    One matrix at a time, the others as chosen so far, by the time of a whole step: what is fastest alone is not
    fastest between its neighbours. Tiles that ``model`` came with are kept and not timed. Slot state and KV cache hold
    nothing of use afterwards.
    """
    work: dict[int, dict[tuple[str, int], list[Tile]]] = {}  # of a bucket: by matrix and a layer that has it
    best: dict[str, Any] = {}
    prefill = {bucket: bucket > model.engine_config.max_batch_size for bucket in ROW_BUCKETS}
    for rows, name in itertools.product(ROW_BUCKETS, ("gate_up", "down", "qkv", "o", "lm_head")):
        if rows > model.x.shape[0] or (name == "lm_head" and (not 8 < rows <= LM_HEAD_ROWS or prefill[rows])):
            continue  # lm_head has no tiles of 8 rows, never runs more than 512, and a prefill needs it for one
        linears = model.linears.named(name)
        for index in {linear.scheme: i for i, linear in reversed([*enumerate(linears)])}.values():
            linear = linears[index]
            if tile := model.linears.tiles.chosen(name, linear.scheme, rows):
                best[f"{name}/{linear.scheme.name}/{rows}"] = asdict(tile)
            elif not model.linears.streams(name, linear, rows):
                tiles = dict.fromkeys(fit(tile, linear, rows) for tile in choices(name, rows, linear))
                work.setdefault(rows, {})[name, index] = list(tiles)
    progress(f"compiling {sum(len(tiles) for names in work.values() for tiles in names.values())} kernels")
    pool = ThreadPoolExecutor(os.cpu_count())
    with pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for bucket, names in work.items():
            for (name, index), tiles in names.items():
                for tile in tiles:
                    model.run_linear(name, index, bucket, tile)
    for bucket, names in work.items():
        run = model.sample_step(bucket, prefill[bucket])
        for (name, index), tiles in names.items():
            timed, scheme = [], model.linears.named(name)[index].scheme
            for tile in tiles:
                model.linears.tiles.set(name, scheme, bucket, tile)
                try:
                    timed.append((time_graph(run), tile))
                except (triton.runtime.OutOfResources, triton.CompilationError):
                    continue  # too large for this GPU's shared memory or registers
            fastest, tile = min(timed, key=lambda pair: pair[0])
            model.linears.tiles.set(name, scheme, bucket, tile)
            best[f"{name}/{scheme.name}/{bucket}"] = asdict(tile)
            what = f"{name} {scheme.name}, {bucket} rows"
            progress(f"{what}: step {timed[0][0]:.3f} -> {fastest:.3f} ms {tile}")
    model.position.zero_()
    return {"format_version": FORMAT_VERSION, "gpu": gpu_name(model.device), "tiles": best}


def tune_engine(engine_dir: Path, like: Path | None = None) -> str:
    """Tune a built engine for the GPU at hand and store the result in it; one line that says what came of it.

    ``like``: an engine of the same geometry whose tiles are taken, so that only what it lacks is timed.
    """
    started = time.perf_counter()
    info = load_engine_json(engine_dir)
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        ranks = info.engine.tp_size  # whose shares are alike: the first stands for all, and exchanges with nobody
        weights = load_weights(engine_dir, info.model, device, 0, ranks)
        engine = replace(info.engine, num_kv_blocks=2)
        tiles = Tiles(load_tuning(like) if like else None, gpu_name(device))
        model = GpuModel(info.model.share(ranks), engine, weights, tiles)
        tuning = tune(model)
    except (InputError, RunError, torch.cuda.OutOfMemoryError) as error:
        return f"GPU kernels: not tuned ({' '.join(str(error).split())})"
    write_text(engine_dir / TUNING_FILE, json.dumps(tuning, indent=1))
    count, seconds = len(tuning["tiles"]), time.perf_counter() - started
    return f"GPU kernels: {count} tiles tuned for {tuning['gpu']} in {seconds:.0f} s"
