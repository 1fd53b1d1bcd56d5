"""Models, checkpoints and engines that many tests share, made once a session in a temporary place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_engine.build import build_native
from llama_engine.config import EngineConfig
from llama_engine.convert import ConvertOptions, convert
from llama_engine.prepare import prepare_default, prepare_synthetic

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if "gpu" in item.keywords])
        items[:] = [item for item in items if "gpu" not in item.keywords]


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
def smollm2_engine(smollm2_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("smollm2")
    convert(smollm2_model, root / "checkpoint", ConvertOptions(int8=True))
    build_native(root / "checkpoint", root / "engine", EngineConfig())
    return root / "engine"


@pytest.fixture
def edit_json() -> Callable[[Path, dict], None]:
    """Merge keys into a JSON file; a key set to None is removed."""

    def edit(path: Path, changes: dict) -> None:
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return edit


@pytest.fixture
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script of the repository as a user would, and return what it printed."""

    def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, *map(str, args)] if script.endswith(".py") else [script, *map(str, args)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    return run
