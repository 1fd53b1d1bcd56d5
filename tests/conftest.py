"""Models, checkpoints and engines that many tests share, made once a run for all workers, in a temporary place."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before PyTorch and what a test starts read it
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the first kernel is imported
from llama_engine import trtllm
from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.checkpoint.prepare import prepare_default, prepare_synthetic
from llama_engine.config import DEFAULT_MODEL, EngineConfig
from llama_engine.cpu.fused import compile_library
from tests.interpreter import quicken
from tests.results import write_folder

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    quicken()

ROOT = Path(__file__).parent.parent
STANDIN = ROOT / "tests/standin"  # of NVIDIA's package and its program
TRT_LIMITS = EngineConfig(max_batch_size=4, max_seq_len=64, max_num_tokens=8192)
TRT_FLAGS = {
    "gemm_plugin": "auto",
    "gpt_attention_plugin": "auto",
    "use_paged_context_fmha": "enable",
    "use_fused_mlp": "enable",
}
STOPS = (signal.SIGINT, signal.SIGTERM)
MAX_WORKERS = 8
# What takes longest goes first; the other files follow in the order of their names.
DEMO = "tests/llm_demo"
SHARE_SERVERS = tuple(f"{DEMO}/test_{name}.py" for name in ("arena", "gateway", "openai", "page", "replay"))
LONGEST = (DEMO, "tests/test_readme.py", "tests/serving/test_lifecycle.py", "tests/serving/test_server.py")
# Called as cpu/fused.py calls it: FLAGS -o TARGET SOURCE. Two workers that want the same wait for one compiler.
CACHING_COMPILER = """#!/bin/sh
flags=
while [ "$1" != -o ]; do flags="$flags $1"; shift; done
kept=$(dirname "$0")/$(echo "$flags" | cat - "$3" | sha256sum | cut -c1-16)
command -v flock >/dev/null && exec 9>"$kept.lock" && flock 9
[ -e "$kept" ] || { COMPILER $flags -o "$kept.$$" "$3" && mv "$kept.$$" "$kept"; } && cp "$kept" "$2"
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also the tests that take many minutes together")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        late = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if item not in late]
    if not torch.cuda.is_available():
        # By marker, not keyword: the directory tests/gpu is a keyword of all that lies in it.
        needing = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
    items.sort(key=lambda item: place(scope(item.nodeid)))  # stable


def scope(nodeid: str) -> str:
    """What one worker runs as a whole: a file, for its module's fixtures, or the demo's files that share servers."""
    file = nodeid.partition("::")[0]
    return DEMO if file in SHARE_SERVERS else file


def place(scope: str) -> int:
    return LONGEST.index(scope) if scope in LONGEST else len(LONGEST)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The meaning of ``-n auto``: a worker a core, but an engine takes most of a GPU's memory."""
    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, MAX_WORKERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling  # this hook is called by pytest-xdist alone

    class Scopes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    config.option.loadscopereorder = False  # it would put many short tests before few long ones
    return Scopes(config, log)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """``shared(name, make)``: the path ``name`` of this run, for all workers, made by the first that asks for it."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if workers else root) / "shared"

    def path(name: str, make: Callable[[Path], object]) -> Path:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                make(target)
        return target

    return path


@pytest.fixture(scope="session", autouse=True)
def one_compilation(shared: Callable[..., Path]) -> Iterator[None]:
    """Every engine directory gets its own compiled CPU kernel, which takes a compiler ten seconds: run it once."""
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))), None)

    def write(wrapper: Path) -> None:
        wrapper.write_text(CACHING_COMPILER.replace("COMPILER", compiler))
        wrapper.chmod(0o755)

    with pytest.MonkeyPatch.context() as patch:
        if compiler:
            patch.setenv("CXX", str(shared("c++", write)))
        yield


def build(checkpoint: Path, target: Path, config: EngineConfig) -> None:
    build_native(checkpoint, target, config)
    compile_library(target / "kernels")  # now: later a worker might copy the directory while another compiles into it


@pytest.fixture(scope="session")
def tiny_model(shared: Callable[..., Path]) -> Path:
    """Two layers, hidden 128, vocabulary 512, llama3 RoPE scaling, random weights, no tokenizer."""
    return shared("models/synthetic-tiny", lambda target: prepare_synthetic("tiny", target.parent))


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: Path, shared: Callable[..., Path]) -> Path:
    return shared("checkpoints/tiny", lambda target: convert(tiny_model, target, ConvertOptions(int8=True)))


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, shared: Callable[..., Path]) -> Path:
    config = EngineConfig(max_batch_size=4, max_seq_len=256, max_num_tokens=64, tokens_per_block=16)
    return shared("engines/tiny", lambda target: build(tiny_checkpoint, target, config))


@pytest.fixture(scope="session")
def worded_engine(shared: Callable[..., Path]) -> Path:
    """The tiny model with a tokenizer of made-up words: what a gateway needs."""

    def make(target: Path) -> None:
        model = prepare_synthetic("tiny", target.parent / "worded-model", words=True)
        convert(model, target.parent / "worded-checkpoint", ConvertOptions(int8=True))
        limits = EngineConfig(max_batch_size=4, max_seq_len=256, max_num_tokens=64, tokens_per_block=16)
        build(target.parent / "worded-checkpoint", target, limits)

    return shared("engines/worded/engine", make)


@pytest.fixture(scope="session")
def smollm2_model(shared: Callable[..., Path]) -> Path:
    """The real default model, with its tokenizer; kept in models/ because preparing it takes a while."""
    shared("smollm2-intact", lambda checked: checked.write_text(str(prepare_default(ROOT / "models"))))
    return ROOT / "models" / DEFAULT_MODEL


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_model: Path, shared: Callable[..., Path]) -> Path:
    return shared("checkpoints/smollm2", lambda target: convert(smollm2_model, target, ConvertOptions(int8=True)))


@pytest.fixture(scope="session")
def smollm2_engine(smollm2_checkpoint: Path, shared: Callable[..., Path]) -> Path:
    return shared("engines/smollm2", lambda target: build(smollm2_checkpoint, target, EngineConfig()))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in of TensorRT-LLM, importable and with trtllm-build on PATH, and a GPU in sight."""
    monkeypatch.setattr(trtllm, "visible_arch", lambda: "sm80")
    monkeypatch.syspath_prepend(str(STANDIN))
    places = (str(STANDIN / "bin"), str(Path(sys.executable).parent), os.environ["PATH"])
    monkeypatch.setenv("PATH", os.pathsep.join(places))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture
def trt_engine(installed: None, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny model's TensorRT engine, as the stand-in makes one."""
    trtllm.build(tiny_checkpoint, tmp_path / "e", TRT_LIMITS, TRT_FLAGS)
    return tmp_path / "e"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete machine's results in a repository of its own."""
    return write_folder(tmp_path / "results" / "box")


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
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of which pictures are drawn, not of what they look like."""
    monkeypatch.setattr("llama_engine.report.plots.STYLE", {"figure.dpi": 20})


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
