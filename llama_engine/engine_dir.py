"""An engine directory: ``engine.json``, which says what was built and for which backend, beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import ErrorCode, InputError
from llama_engine.files import read_json

ENGINE_JSON = "engine.json"
FORMAT_VERSION = 3
ACTIVATION_BUDGET = 0.01  # of a layer's output, RMS: what the accuracy gate allows the logits
WEIGHTS_FILE = "engine.safetensors"
WEIGHTS = {"native": WEIGHTS_FILE, "tensorrt_llm": "rank0.engine"}  # the backends, and the file each loads


@dataclass(frozen=True)
class TensorRTInfo:
    """What ``trtllm-build`` does not record: the GPU and the release that an engine is for, which alone can load it,
    its tensor-parallel ranks, and the bytes of weights that one rank reads in a decode step."""

    arch: str
    version: str
    ranks: int
    step_nbytes: int


@dataclass(frozen=True)
class EngineInfo:
    """What ``engine.json`` says. ``identity`` is the model's name, source and sha256; ``quant_algo`` the checkpoint's,
    None where it was 16-bit; ``activation_losses`` what
    :func:`llama_engine.checkpoint.calibration.activation_losses` found, empty where no integer kernel runs;
    ``tensorrt_llm`` is None for a native engine."""

    backend: str
    model: ModelConfig
    engine: EngineConfig
    checkpoint_sha256: str
    weights_sha256: str
    identity: dict[str, str]
    quant_algo: str | None
    activation_losses: list[float]
    tensorrt_llm: TensorRTInfo | None = None

    @property
    def max_input_len(self) -> int:
        """The longest prompt: TensorRT-LLM reads each in one step, whatever ``max_seq_len`` says."""
        limits = self.engine
        return min(limits.max_seq_len, limits.max_num_tokens) if self.tensorrt_llm else limits.max_seq_len

    def check_input(self, prompt_tokens: int, flag: str = "the prompt") -> None:
        """Raise :class:`InputError`, with the numbers and the ``flag`` that asked, for a prompt that is too long."""
        if prompt_tokens > self.max_input_len:
            raise InputError(
                f"{flag}: {prompt_tokens} tokens are more than the {self.max_input_len} that this TensorRT-LLM engine "
                "reads at once: build it with a larger --max_num_tokens",
                ErrorCode.CONTEXT_LENGTH,
            )

    @property
    def needs_float_activations(self) -> bool:
        """Whether some layer loses more than the budget in the fused kernels, so that PyTorch's must run."""
        return max(self.activation_losses, default=0.0) > ACTIVATION_BUDGET


def load_engine_json(engine_dir: Path | str, *, backend: str = "native") -> EngineInfo:
    """Read and check ``engine.json``; ``backend`` auto takes any.

    Raises :class:`InputError` for another backend and a damaged directory.
    """
    path = Path(engine_dir) / ENGINE_JSON
    if not path.is_file():
        raise InputError(f"{engine_dir} is not an engine ({ENGINE_JSON} is missing): run scripts/build_engine.sh")
    data = read_json(path)
    found = data.get("backend")
    if found not in WEIGHTS:
        raise InputError(f"{path}: unknown backend {found!r}: build the engine again")
    if backend not in ("auto", found):
        raise InputError(
            f"{engine_dir} is an engine of backend {found}, but this needs one of backend {backend}: build one with "
            f"scripts/build_engine.sh --backend {backend}"
        )
    if data.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {data.get('format_version')!r}, expected {FORMAT_VERSION}: build the engine again"
        )
    keys = {"format_version", "backend", "model", "engine", "checkpoint_sha256", "model_identity", "weights"}
    keys |= {"activation_losses", "quant_algo"} | ({"tensorrt_llm"} if found == "tensorrt_llm" else set())
    if set(data) != keys:
        raise InputError(f"{path}: unknown or missing keys {sorted(set(data) ^ keys)}: build the engine again")
    weights = Path(engine_dir) / WEIGHTS[found]
    if not weights.is_file() or weights.stat().st_size != data["weights"]["bytes"]:
        raise InputError(f"{weights} is missing or does not belong to {path}: build the engine again")
    return EngineInfo(
        backend=found,
        model=ModelConfig.from_dict(data["model"]),
        engine=EngineConfig.from_dict(data["engine"]),
        checkpoint_sha256=data["checkpoint_sha256"],
        weights_sha256=data["weights"]["sha256"],
        identity=data["model_identity"],
        quant_algo=data["quant_algo"],
        activation_losses=data["activation_losses"],
        tensorrt_llm=TensorRTInfo(**data["tensorrt_llm"]) if found == "tensorrt_llm" else None,
    )
