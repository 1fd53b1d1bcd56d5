"""Tensors in .safetensors files, read lazily and written row by row, and the worker threads that make them."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open

from llama_engine.errors import InputError, RunError

T = TypeVar("T")
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of the tensors in a file: name to dtype and shape
CHUNK_ELEMENTS = 1 << 19  # elements one worker holds at a time: 2 MB in float32, which stays in the cache
SAFE_DTYPES = {torch.int8: "I8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
SAFE_DTYPES |= {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}


def row_chunks(rows: int, columns: int, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Split ``rows`` into ranges of about ``elements`` (:data:`CHUNK_ELEMENTS`), each from a multiple of 4 on."""
    step = max((elements or CHUNK_ELEMENTS) // columns // 4, 1) * 4
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def parallel(function: Callable[[T], int | None], items: Sequence[T], bar: str | None = None, total: int = 0) -> None:
    """Run ``function`` over ``items`` on all cores, one torch thread each; the first error stops the rest.

    With ``bar``, a progress bar of that name where stderr is a terminal, of ``total`` bytes: ``function`` returns how
    many it did.
    """
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True))
    shown = bar is not None and console.is_terminal
    progress = Progress(TextColumn("{task.description}"), *columns, console=console, disable=not shown)
    workers, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    try:
        with progress, ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            task = progress.add_task(bar or "", total=total)
            for done in pool.map(function, items):
                progress.advance(task, done or 0)
    finally:
        torch.set_num_threads(threads)


def open_tensors(path: Path, device: str = "cpu") -> Any:
    """``safe_open`` of a .safetensors file. Raises :class:`InputError` that names a damaged or missing one."""
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete .safetensors file: {error}") from None


class TensorFileWriter:
    """Write a .safetensors file row by row, from many threads, without ever holding a whole tensor.

    The file is allocated in full first, so a full disk shows at once; rows never written are zero.
    """

    def __init__(self, path: Path, specs: Specs, metadata: dict[str, str] | None = None) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for name, (dtype, shape) in specs.items():
            start, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": SAFE_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        self._places = {name: (specs[name][0], base + header[name]["data_offsets"][0]) for name in specs}
        self.nbytes = base + end
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed with the writer; nothing is ever buffered)
        try:
            os.posix_fallocate(self._file.fileno(), 0, self.nbytes)
            self._file.write(struct.pack("<Q", len(text)) + text)
        except OSError as error:
            raise RunError(f"cannot write {path} ({self.nbytes / 1e9:.2f} GB): {error.strerror}") from None

    def write(self, name: str, start: int, data: torch.Tensor) -> None:
        """Write ``data`` from row ``start`` of tensor ``name`` on, a row being as long as those of ``data``."""
        dtype, place = self._places[name]
        if data.dtype != dtype:
            raise ValueError(f"{name}: got {data.dtype}, the file holds {dtype}")
        place += start * data[0].nbytes
        view = memoryview(data.contiguous().view(torch.uint8).reshape(-1).numpy())
        while view:
            written = os.pwrite(self._file.fileno(), view, place)
            view, place = view[written:], place + written
