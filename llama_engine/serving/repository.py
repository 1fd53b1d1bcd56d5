"""Render Triton's model repository for an engine of either backend, and how NVIDIA's C++ backend is started over it.

Templates lie in triton_model_repo/ with ``${name}`` placeholders, as in NVIDIA's repository.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shutil
import string
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_engine.config import KERNELS
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2] / "triton_model_repo"
CONTAINER = "nvcr.io/nvidia/tritonserver:{}-trtllm-python-py3"
# The container of each release, by NVIDIA's compatibility matrix: an engine loads in its own release alone.
TAGS = {"0.15.0": "24.11", "0.16.0": "24.12", "0.17.0": "25.01", "0.20.0": "25.07", "0.21.0": "25.08"}
TAGS |= {"1.0.0": "25.10", "1.1.0": "25.12"}
BACKEND = Path("/opt/tritonserver/backends/tensorrtllm")


@dataclass(frozen=True)
class ServeConfig:
    """What ``serve_triton`` can set. Times in seconds; ``request_timeout_s`` 0 means none.

    ``decoupled`` chooses Triton's transaction policy: true serves gRPC streams and HTTP ``generate`` and
    ``generate_stream``; false serves the plain HTTP and gRPC ``infer`` calls, which Triton refuses for decoupled
    models. ``text`` adds the ensemble, text in and text out. ``enable_prefix_cache`` is the parameter
    ``enable_kv_cache_reuse`` of the model; NVIDIA's needs an engine built for it, so theirs stays off. ``instances`` is
    the count of Triton's instance group: so many engines in one server, on GPUs one a card.
    """

    device: str = "auto"
    kernels: str = "auto"
    decoupled: bool = True
    max_queue_size: int = 256
    request_timeout_s: float = 0.0
    drain_s: float = 10.0
    stream_interval: int = 1
    exclude_input_in_output: bool = False
    enable_prefix_cache: bool = True
    null_model: bool = False
    text: bool = False
    instances: int = 1

    def __post_init__(self) -> None:
        if not all(0 <= value < math.inf for value in (self.max_queue_size, self.request_timeout_s, self.drain_s)):
            raise InputError("max_queue_size, request_timeout_s and drain_s must be finite and not negative")
        if self.stream_interval < 1:
            raise InputError(f"stream_interval must be at least 1, got {self.stream_interval}")
        if self.instances < 1:
            raise InputError(f"instances must be at least 1, got {self.instances}")


def add_kernels(parser: argparse.ArgumentParser) -> None:
    """``--kernels`` of the scripts that start servers, for :attr:`ServeConfig.kernels`."""
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="of the engine (default: auto)")


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
    if config.instances > 1 and backend != "native":
        raise InputError("several instances in one server are the native backend's: start a server a GPU instead")
    in_container = backend == "tensorrt_llm" and not BACKEND.is_dir()
    values: dict[str, object] = asdict(config) | {
        "max_batch_size": info.engine.max_batch_size,
        "kv_cache_free_gpu_mem_fraction": info.engine.kv_cache_free_gpu_memory_fraction,
        "max_tokens_in_paged_kv_cache": info.engine.kv_tokens(info.engine.max_batch_size),
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
    else in the container of the engine's release, which sees the engine at /engine, the repository at /models and this
    package, for the text models, in /package. An engine of several ranks runs as in NVIDIA's leader mode: one server a
    rank under mpirun, of which the first answers. Raises :class:`InputError` where no server can load the engine."""
    package, built = Path(__file__).resolve().parents[1], load_engine_json(engine_dir, backend="tensorrt_llm")
    assert built.tensorrt_llm
    version, ranks = built.tensorrt_llm.version, built.tensorrt_llm.ranks
    binary, models = "tritonserver", Path("/models")
    if BACKEND.is_dir():
        found = importlib.metadata.version("tensorrt_llm")
        if found != version:
            raise InputError(f"{engine_dir} is for TensorRT-LLM {version}, installed is {found}: build it again here")
        prefix, models = ["env", f"PYTHONPATH={package.parent}"], models_dir
        binary = "/opt/tritonserver/bin/tritonserver"
    else:
        if version not in TAGS:
            raise InputError(
                f"{engine_dir} is for TensorRT-LLM {version}, and which of NVIDIA's containers has that is not known "
                "here: start this command where it is installed"
            )
        prefix = ["docker", "run", "--rm", "--gpus", "all", "--network", "host", "--shm-size", "2g"]
        prefix += ["-v", f"{Path(engine_dir).resolve()}:/engine:ro", "-v", f"{models_dir.resolve()}:/models:ro"]
        prefix += ["-v", f"{package}:/package/{package.name}:ro", "-e", "PYTHONPATH=/package"]
        prefix.append(CONTAINER.format(TAGS[version]))
    server = [binary, f"--model-repository={models}", *arguments]
    if ranks == 1:
        return [*prefix, *server]
    command = [*prefix, "mpirun", "--allow-run-as-root"]
    for rank in range(ranks):
        alone = ["--model-control-mode=explicit", "--load-model=tensorrt_llm"] if rank else []
        memory = f"--backend-config=python,shm-region-prefix-name=prefix{rank}_"
        command += [*([":"] if rank else []), "-n", "1", *server, *alone, memory]
    return command


def _quoted(value: object) -> str:
    """A value as protobuf text has it, inside quotes or bare."""
    return str(value).lower() if isinstance(value, bool) else json.dumps(str(value))[1:-1]
