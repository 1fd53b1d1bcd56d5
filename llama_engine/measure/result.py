"""Result files: build, validate, write whole, read. The schema is ``result.schema.json`` beside this file."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema

from llama_engine.errors import InputError
from llama_engine.files import check_apart, read_json, write_text
from llama_engine.measure import validity

SCHEMA_VERSION = "1.0"
MEASUREMENTS = ("baseline", "optimized", "triton", "served")  # benchmarks whose samples are times
SCHEMA_FILE = Path(__file__).with_name("result.schema.json")
Result = dict[str, Any]


def new_result(
    benchmark: str,
    backend: str,
    *,
    model: dict[str, Any],
    workload: dict[str, Any],
    environment: dict[str, Any],
    samples: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    **more: Any,
) -> Result:
    """A complete result with its validity verdict; ``more`` adds top-level keys (levels, checks, telemetry, ...)."""
    result = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "backend": backend,
        "model": model,
        "workload": workload,
        "environment": environment,
        "samples": samples or {},
        "summary": summary or {},
        **more,
    }
    result["validity"] = validity.judge(result)
    return result


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def validate(result: Result, where: str = "result") -> None:
    """Raise :class:`InputError` that names the first key which breaks the schema."""
    error = jsonschema.exceptions.best_match(_validator().iter_errors(result))
    if error is not None:
        raise InputError(f"{where}: {'/'.join(map(str, error.absolute_path)) or 'top level'}: {error.message[:300]}")


def check_output(path: str | Path, force: bool, *inputs: Path) -> Path:
    """Refuse, before a long run, an output that lies in an input directory, is a directory, or exists already.

    ``force`` allows to replace a measurement, never another file. Raises :class:`InputError`.
    """
    path = Path(path)
    check_apart(path, inputs)
    if path.is_dir():
        raise InputError(f"{path} is a directory: give --output a file's name")
    if path.exists() and not force:
        raise InputError(f"{path} already exists: give --force to replace it, or another --output")
    if path.exists() and path.stat().st_size and not _is_measurement(path):
        raise InputError(f"{path} is no measurement, so --force does not replace it: give another --output")
    return path


def _is_measurement(path: Path) -> bool:
    """Whether a file is a result, or what the profiled scripts hand to the profile's reader."""
    try:
        return {"model", "workload", "environment"} <= read_json(path).keys()
    except InputError:
        return False


def check_folder(path: str | Path) -> Path:
    """Refuse, before a long run, a file where a folder of results shall be. Raises :class:`InputError`."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, not a directory: give another --output")
    return path


def write_result(path: str | Path, result: Result, *, force: bool = False) -> Path:
    """Validate and write atomically. Raises :class:`InputError` when the file exists and ``force`` is false."""
    path = check_output(path, force)
    validate(result, str(path))
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def load_result(path: str | Path) -> Result:
    """Read and validate. Raises :class:`InputError` with the file's name."""
    result = read_json(Path(path))
    validate(result, str(path))
    return result


def result_files(folder: str | Path) -> list[Path]:
    """The JSON of one machine's folder, sorted, without the sources of its report."""
    return sorted(path for path in Path(folder).glob("*.json") if not path.name.endswith(".sources.json"))


def load_folder(folder: str | Path) -> dict[str, Result]:
    """All result files of one machine's folder, by file stem. Raises :class:`InputError` when there is none."""
    paths = result_files(folder)
    if not paths:
        raise InputError(f"{folder} holds no result files: run the benchmarks first (scripts/run_all.sh)")
    return {path.stem: load_result(path) for path in paths}


def dig(data: Any, path: str) -> Any:
    """``dig(result, "summary.ttft_ms.p50")``; None where a step is missing. A number indexes a list."""
    for key in path.split("."):
        if isinstance(data, list):
            data = dict(enumerate(data)).get(int(key))
        else:
            data = data.get(key) if isinstance(data, dict) else None
    return data
