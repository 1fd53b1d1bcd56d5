"""Models, checkpoints and engines that many tests share, made once a session in a temporary place."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the first kernel is imported

from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.prepare import prepare_default, prepare_synthetic
from llama_engine.config import EngineConfig

ROOT = Path(__file__).parent.parent
STOPS = (signal.SIGINT, signal.SIGTERM)
# Called as cpu/fused.py calls it: FLAGS -o TARGET SOURCE.
CACHING_COMPILER = """#!/bin/sh
flags=
while [ "$1" != -o ]; do flags="$flags $1"; shift; done
kept=$(dirname "$0")/$(echo "$flags" | cat - "$3" | sha256sum | cut -c1-16)
[ -e "$kept" ] || { COMPILER $flags -o "$kept.$$" "$3" && mv "$kept.$$" "$kept"; } && cp "$kept" "$2"
"""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        # By marker, not keyword: the directory tests/gpu is a keyword of all that lies in it.
        needing = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]


@pytest.fixture(scope="session", autouse=True)
def one_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every engine directory gets its own compiled CPU kernel, which takes a compiler ten seconds: run it once."""
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))), None)
    with pytest.MonkeyPatch.context() as patch:
        if compiler:
            wrapper = tmp_path_factory.mktemp("compiler") / "c++"
            wrapper.write_text(CACHING_COMPILER.replace("COMPILER", compiler))
            wrapper.chmod(0o755)
            patch.setenv("CXX", str(wrapper))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, hidden 128, vocabulary 512, llama3 RoPE scaling, random weights, no tokenizer."""
    return prepare_synthetic("tiny", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoints") / "tiny"
    convert(tiny_model, target, ConvertOptions(int8=True))
    return target


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("engines") / "tiny"
    config = EngineConfig(max_batch_size=4, max_seq_len=256, max_num_tokens=64, tokens_per_block=16)
    build_native(tiny_checkpoint, target, config)
    return target


@pytest.fixture(scope="session")
def smollm2_model() -> Path:
    """The real default model, with its tokenizer; kept in models/ because preparing it takes a while."""
    return prepare_default(ROOT / "models")


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoints") / "smollm2"
    convert(smollm2_model, target, ConvertOptions(int8=True))
    return target


@pytest.fixture(scope="session")
def smollm2_engine(smollm2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("engines") / "smollm2"
    build_native(smollm2_checkpoint, target, EngineConfig())
    return target


@pytest.fixture
def edit_json() -> Callable[[Path, dict], None]:
    """Merge keys into a JSON file; a key set to None is removed."""

    def edit(path: Path, changes: dict) -> None:
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return edit


@pytest.fixture
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring this machine's bandwidth over four times its cache takes seconds that few tests need."""
    monkeypatch.setattr("llama_engine.measure.environment._l3_bytes", lambda: None)


@pytest.fixture
def kept_handlers() -> Iterator[None]:
    """For tests in whose process a script catches Ctrl-C and TERM."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_script(
    kept_handlers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run a script of the repository as a user would, and return what it printed.

    Python ones run as ``__main__`` of this process, which has imported PyTorch already; the README's tests start each
    in a process of its own.
    """
    threads = torch.get_num_threads()

    def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
        command = [script, *map(str, args)]
        if script.endswith(".sh"):
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr("sys.argv", command)
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(script, run_name="__main__")
        return subprocess.CompletedProcess(command, stopped.value.code or 0, *capsys.readouterr())

    yield run
    torch.set_num_threads(threads)
