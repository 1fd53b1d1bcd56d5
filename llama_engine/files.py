"""Files and directories that appear whole or not at all, their hashes, and the progress bar of every long step."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
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
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")
SAFE_DTYPES = {torch.int8: "I8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
SAFE_DTYPES |= {torch.float8_e4m3fn: "F8_E4M3"}


@contextlib.contextmanager
def atomic_dir(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``target`` that takes its place when the block ends without an error.

    What a killed run left behind is removed by the next one. Raises :class:`InputError` when ``target`` exists and
    ``force`` is false, or when another process is writing it.
    """
    target = Path(target).absolute()
    if target.exists() and not force:
        raise InputError(f"{target} already exists: give --force to replace it, or another directory")
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, not a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old, lock_path = (target.parent / f".{target.name}.{kind}" for kind in ("partial", "old", "lock"))
    with open(lock_path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing {target}: wait for it, or choose another directory") from None
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                os.replace(target, old)
            os.replace(partial, target)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_files(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file by name, one thread a file."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return {path.name: digest for path, digest in zip(paths, pool.map(sha256_file, paths))}


def combined_sha256(digests: dict[str, str]) -> str:
    """One SHA-256 for named files: of the lines ``<sha256>  <name>``, sorted by name."""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises :class:`InputError` that names the file."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data


@contextlib.contextmanager
def checked(path: Path) -> Iterator[None]:
    """What a wrong value out of ``path`` raises in the block becomes an :class:`InputError` that names the file."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path} lacks a value or holds one of the wrong kind: {error}") from None


def write_json(path: Path, data: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write beside ``path``, then rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy whatever tokenizer files ``source`` has; a model without a tokenizer is prompted with token ids."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def row_chunks(rows: int, columns: int, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Split ``rows`` into ranges of about ``elements`` (default: :data:`CHUNK_ELEMENTS`), each from an even row on."""
    step = max((elements or CHUNK_ELEMENTS) // columns // 2, 1) * 2
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
