"""Render the Triton models that do not need the native engine: text in and out, and NVIDIA's C++ backend.

Templates lie in triton_model_repo/ with ``${name}`` placeholders, as in NVIDIA's repository.
"""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

from llama_engine.build import load_engine_json
from llama_engine.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent / "triton_model_repo"
MAX_QUERY_BYTES = 1 << 20
CONTAINER = "nvcr.io/nvidia/tritonserver:24.11-trtllm-python-py3"
BACKEND = Path("/opt/tritonserver/backends/tensorrtllm")


def fill(template: Path, target: Path, values: dict[str, object]) -> None:
    """Write a template with its placeholders filled; values are quoted for protobuf text."""
    text = string.Template(template.read_text()).substitute({key: _quoted(value) for key, value in values.items()})
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def render_text(
    engine_dir: Path | str,
    models_dir: Path,
    *,
    max_batch_size: int,
    chat_template: bool = True,
    tokenizer_dir: str | None = None,
) -> None:
    """Add preprocessing, postprocessing and ensemble to a model repository that has ``tensorrt_llm``.

    ``tensorrt_llm`` must be rendered with ``exclude_input_in_output``. ``tokenizer_dir`` is where the server finds the
    tokenizer (default: the engine directory). Raises :class:`InputError` for an engine without a tokenizer.
    """
    if not (Path(engine_dir) / "tokenizer_config.json").is_file():
        raise InputError(f"{engine_dir} has no tokenizer, so it cannot serve text: serve token ids, without --text")
    values = {
        "max_batch_size": max_batch_size,
        "tokenizer_dir": tokenizer_dir or Path(engine_dir).resolve(),
        "chat_template": chat_template,
        "max_query_bytes": MAX_QUERY_BYTES,
    }
    for name in ("preprocessing", "postprocessing", "ensemble"):
        fill(REPOSITORY / name / "config.pbtxt", models_dir / name / "config.pbtxt", values)
        (models_dir / name / "1").mkdir(exist_ok=True)
        if name != "ensemble":
            shutil.copy(REPOSITORY / name / "1" / "model.py", models_dir / name / "1" / "model.py")


def render_tensorrtllm(
    engine_dir: Path | str,
    models_dir: Path,
    *,
    decoupled: bool = True,
    max_queue_size: int = 256,
    text: bool = True,
    served_from: str | None = None,
    cuda_graph_mode: bool = False,
) -> None:
    """Write a model repository for the C++ backend ``tensorrtllm``.

    ``served_from`` is the engine directory as the server sees it (default: where :func:`serve_command` puts it).
    ``text`` adds the ensemble.
    Raises :class:`InputError` unless ``engine_dir`` is a TensorRT engine.
    """
    info = load_engine_json(engine_dir, backend="tensorrt_llm")
    path = served_from or (str(Path(engine_dir).resolve()) if BACKEND.is_dir() else "/engine")
    values = {
        "max_batch_size": info.engine.max_batch_size,
        "decoupled": decoupled,
        "max_queue_size": max_queue_size,
        "engine_dir": path,
        "kv_cache_free_gpu_mem_fraction": info.engine.kv_cache_free_gpu_memory_fraction,
        "exclude_input_in_output": text,
        "cuda_graph_mode": cuda_graph_mode,
    }
    fill(REPOSITORY / "tensorrt_llm/config.tensorrtllm.pbtxt", models_dir / "tensorrt_llm/config.pbtxt", values)
    (models_dir / "tensorrt_llm" / "1").mkdir(exist_ok=True)
    if text:
        render_text(engine_dir, models_dir, max_batch_size=info.engine.max_batch_size, tokenizer_dir=path)


def serve_command(engine_dir: Path | str, models_dir: Path, arguments: list[str]) -> list[str]:
    """How to start Triton over :func:`render_tensorrtllm`'s repository: directly where the backend is installed, else
    in NVIDIA's container, which sees the engine at /engine and the repository at /models."""
    if BACKEND.is_dir():
        return ["/opt/tritonserver/bin/tritonserver", f"--model-repository={models_dir}", *arguments]
    mounts = [f"{Path(engine_dir).resolve()}:/engine:ro", f"{Path(models_dir).resolve()}:/models:ro"]
    docker = ["docker", "run", "--rm", "--gpus", "all", "--network", "host", "--shm-size", "2g"]
    return [
        *docker,
        *(part for mount in mounts for part in ("-v", mount)),
        CONTAINER,
        "tritonserver",
        "--model-repository=/models",
        *arguments,
    ]


def _quoted(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else json.dumps(str(value))[1:-1]
