"""Render Triton's model repository for an engine of either backend, and how NVIDIA's C++ backend is started over it.

Templates lie in triton_model_repo/ with ``${name}`` placeholders, as in NVIDIA's repository.
"""

from __future__ import annotations

import json
import math
import shutil
import string
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2] / "triton_model_repo"
CONTAINER = "nvcr.io/nvidia/tritonserver:24.11-trtllm-python-py3"
BACKEND = Path("/opt/tritonserver/backends/tensorrtllm")


@dataclass(frozen=True)
class ServeConfig:
    """What ``serve_triton`` can set. Times in seconds; ``request_timeout_s`` 0 means none.

    ``decoupled`` chooses Triton's transaction policy: true serves gRPC streams and HTTP ``generate`` and
    ``generate_stream``; false serves the plain HTTP and gRPC ``infer`` calls, which Triton refuses for decoupled
    models. ``text`` adds the ensemble, text in and text out. ``enable_prefix_cache`` is the parameter
    ``enable_kv_cache_reuse`` of the model; NVIDIA's needs an engine built for it, so theirs stays off.
    """

    device: str = "auto"
    decoupled: bool = True
    max_queue_size: int = 256
    request_timeout_s: float = 0.0
    drain_s: float = 10.0
    exclude_input_in_output: bool = False
    enable_prefix_cache: bool = True
    null_model: bool = False
    text: bool = False

    def __post_init__(self) -> None:
        if not all(0 <= value < math.inf for value in (self.max_queue_size, self.request_timeout_s, self.drain_s)):
            raise InputError("max_queue_size, request_timeout_s and drain_s must be finite and not negative")


def own_names(models_dir: Path) -> tuple[str, ...]:
    """What a repository that :func:`render` wrote holds; nothing for any other directory."""
    config = models_dir / "tensorrt_llm/config.pbtxt"
    ours = config.is_file() and config.read_bytes().startswith(b"# Template: ")
    return ("tensorrt_llm", "null_model", "preprocessing", "postprocessing", "ensemble") if ours else ()


def render(engine_dir: Path | str, models_dir: Path, config: ServeConfig, backend: str = "native") -> None:
    """Write the model repository for an engine of ``backend``. Raises :class:`InputError` for any other directory."""
    info = load_engine_json(engine_dir, backend=backend)
    if config.text and not (Path(engine_dir) / "tokenizer_config.json").is_file():
        raise InputError(f"{engine_dir} has no tokenizer, so it cannot serve text: serve token ids, without --text")
    if config.text and backend == "native" and int(np.__version__.split(".")[0]) >= 2:
        raise InputError(
            f"serving text needs NumPy 1.26, found {np.__version__} (pip install numpy==1.26.4): this Triton's "
            "Python backend was built for NumPy 1 and loses strings under NumPy 2; token ids work with both"
        )
    in_container = backend == "tensorrt_llm" and not BACKEND.is_dir()
    values: dict[str, object] = asdict(config) | {
        "max_batch_size": info.engine.max_batch_size,
        "kv_cache_free_gpu_mem_fraction": info.engine.kv_cache_free_gpu_memory_fraction,
        "engine_dir": "/engine" if in_container else Path(engine_dir).resolve(),
        "lengths": ", optional: true" if backend == "native" else "",  # NVIDIA's backend cannot do without
        "exclude_input_in_output": config.exclude_input_in_output or config.text,
    }
    inputs = (REPOSITORY / "tensorrt_llm/inputs.pbtxt").read_text().rstrip()
    names = ["tensorrt_llm", *(["null_model"] if config.null_model else [])]
    names += ["preprocessing", "postprocessing", "ensemble"] if config.text else []
    for name in names:
        template = REPOSITORY / ("tensorrt_llm" if name == "null_model" else name) / "config.pbtxt"
        code = REPOSITORY / name / "1" / "model.py"
        if name == backend == "tensorrt_llm":
            template, code = template.with_name("config.tensorrtllm.pbtxt"), None
        quoted = {key: _quoted(value) for key, value in values.items()}
        (models_dir / name / "1").mkdir(parents=True)
        text = string.Template(template.read_text().replace("${inputs}", inputs)).substitute(quoted, name=name)
        (models_dir / name / "config.pbtxt").write_text(text)
        if code and code.is_file():
            shutil.copy(code, models_dir / name / "1")


def serve_command(engine_dir: Path | str, models_dir: Path, arguments: list[str]) -> list[str]:
    """How to start Triton over :func:`render`'s repository for TensorRT-LLM: directly where the backend is installed,
    else in NVIDIA's container, which sees the engine at /engine, the repository at /models and this package, for the
    text models, in /package."""
    package = Path(__file__).resolve().parents[1]
    if BACKEND.is_dir():
        server = ["env", f"PYTHONPATH={package.parent}", "/opt/tritonserver/bin/tritonserver"]
        return [*server, f"--model-repository={models_dir}", *arguments]
    docker = ["docker", "run", "--rm", "--gpus", "all", "--network", "host", "--shm-size", "2g"]
    docker += ["-v", f"{Path(engine_dir).resolve()}:/engine:ro", "-v", f"{models_dir.resolve()}:/models:ro"]
    docker += ["-v", f"{package}:/package/{package.name}:ro", "-e", "PYTHONPATH=/package", CONTAINER]
    return [*docker, "tritonserver", "--model-repository=/models", *arguments]


def _quoted(value: object) -> str:
    """A value as protobuf text has it, inside quotes or bare."""
    return str(value).lower() if isinstance(value, bool) else json.dumps(str(value))[1:-1]
