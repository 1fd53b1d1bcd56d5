"""Files and directories that appear whole or not at all, their hashes, and JSON. Knows nothing of tensors."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llama_engine.errors import InputError

# Tells what this product wrote from anything else: the names (patterns) that such a directory holds, or nothing.
Own = Callable[[Path], Iterable[str]]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")


def check_apart(output: Path | str, inputs: Iterable[Path | str]) -> Path:
    """Where an output really lies: its path with every link followed.

    Raises :class:`InputError` when that equals, contains or lies inside an input, or a place that a link in an input
    directory leads to.
    """
    target = _real(output)
    if target.is_symlink():
        raise InputError(f"{output} cannot be written: its links lead in a circle")
    for given in map(Path, inputs):
        for place in {_real(given), *map(_real, given.iterdir() if given.is_dir() else ())}:
            if target == place or target in place.parents or place in target.parents:
                raise InputError(
                    f"the output {output} overlaps the input {given} (is it, holds it or lies in it): "
                    "choose another place"
                )
    return target


def _real(path: Path | str) -> Path:
    """With every link followed; Path.resolve fails on a circle of links in some versions of Python."""
    return Path(os.path.realpath(path))


def check_replaceable(target: Path, own: Own) -> None:
    """Raise :class:`InputError` unless ``target`` is absent, empty, or holds nothing but what ``own`` knows."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file, not a directory: choose another directory")
    if target.is_mount():
        raise InputError(f"{target} is a mount point, which cannot be replaced: choose a directory inside it")
    if not target.exists() or not any(target.iterdir()):
        return
    patterns = list(own(target))
    if not patterns:
        raise InputError(
            f"{target} was not written by this command, so it is never replaced: choose another directory, or remove it"
        )
    names = sorted(path.name for path in target.iterdir())
    if foreign := [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]:
        raise InputError(
            f"{target} also holds {foreign[0]}, which this command did not write: move that away, "
            "or choose another directory"
        )


@contextlib.contextmanager
def atomic_dir(
    output: Path | str, own: Own, *, inputs: Iterable[Path | str] = (), force: bool = False
) -> Iterator[Path]:
    """Yield an empty directory that takes ``output``'s place, links followed, when the block ends without an error.

    What a killed run left behind is mended by the next one. Raises :class:`InputError` when ``output`` overlaps one of
    ``inputs``, when it holds anything and ``force`` is false, when ``own`` does not know it, or when another process is
    writing it.
    """
    target = check_apart(output, inputs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{target.parent} is not a directory: choose another place for {target.name}") from None
    partial, old, lock_path = (target.parent / f".{target.name}.{kind}" for kind in ("partial", "old", "lock"))
    with open(lock_path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing {target}: wait for it, or choose another directory") from None
        try:
            if old.exists() and not target.exists():  # a run was killed between its two renames
                os.replace(old, target)
            if target.is_dir() and any(target.iterdir()) and not force:
                raise InputError(f"{target} already exists: give --force to replace it, or another directory")
            check_replaceable(target, own)
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
    """Report any bad value read from ``path`` as an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path} lacks a value or holds one of the wrong kind: {error}") from None


def write_json(path: Path, data: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write beside ``path``, links followed, then rename: a reader sees the old file or the new one."""
    path = _real(path)
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
