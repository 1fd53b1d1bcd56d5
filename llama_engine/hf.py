"""Read a Llama model in Hugging Face format, row range by row range, never a whole shard.

Accepts ``model.safetensors`` or shards with ``model.safetensors.index.json``, in fp16, bf16 or fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llama_engine.config import ModelConfig
from llama_engine.errors import InputError
from llama_engine.files import combined_sha256, read_json, row_chunks, sha256_files

PREPARED = "prepared.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Hugging Face Llama; ``lm_head.weight`` only where it is not tied to the embedding."""
    hidden, inter = config.hidden_size, config.intermediate_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (config.q_size, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (config.kv_size, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (config.kv_size, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, config.q_size)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (inter, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inter, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inter)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


class HFModel:
    """A Hugging Face Llama directory. Construction reads and checks every header; values are read on demand.

    Raises :class:`InputError` for a missing or half directory, pickled weights, a missing or misshapen tensor, an
    unsupported configuration or dtype; reading raises it for NaN, Inf or a value that fp16 cannot hold.
    """

    def __init__(self, model_dir: Path | str) -> None:
        self.dir = Path(model_dir)
        if not self.dir.is_dir():
            raise InputError(
                f"model directory {self.dir} does not exist: run scripts/prepare_model.py, or give --model-dir"
            )
        self.hf_config: dict[str, Any] = read_json(self.dir / "config.json")
        if self.hf_config.get("quantization_config"):
            raise InputError(f"{self.dir}/config.json: the weights are already quantized; a 16-bit model is needed")
        prepared = read_json(self.dir / PREPARED) if (self.dir / PREPARED).is_file() else {}
        try:
            self.config = ModelConfig.from_hf(
                self.hf_config,
                name=prepared.get("name", self.dir.resolve().name),
                source=prepared.get("source", "pretrained"),
            )
        except InputError:
            raise
        except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"{self.dir}/config.json holds a value of the wrong kind: {error}") from None
        self.files = self._weight_files()
        self._where: dict[str, Path] = {}
        self.shapes = dict(tensor_shapes(self.config))
        self._check_headers()

    def _weight_files(self) -> list[Path]:
        if (self.dir / INDEX).is_file():
            weight_map = read_json(self.dir / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
                raise InputError(f"{self.dir / INDEX}: weight_map must map tensors to file names without a path")
            names = sorted(set(weight_map.values()))
        elif (self.dir / SINGLE).is_file():
            names = [SINGLE]
        elif any(self.dir.glob("*.bin")) or any(self.dir.glob("*.pt")):
            raise InputError(
                f"{self.dir} holds pickled weights (.bin), which can run code when opened: "
                "save the model as .safetensors (model.save_pretrained) and try again"
            )
        else:
            names = []
        if not names:
            raise InputError(f"{self.dir} has no {SINGLE} and no {INDEX}: the download is incomplete or not a model")
        missing = [name for name in names if not (self.dir / name).is_file()]
        if missing:
            raise InputError(
                f"{self.dir} is incomplete: {len(missing)} of {len(names)} shards missing, first {missing[0]}"
            )
        return [self.dir / name for name in names]

    def _check_headers(self) -> None:
        for path in self.files:
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    if name not in self.shapes:
                        continue
                    entry = file.get_slice(name)
                    if tuple(entry.get_shape()) != self.shapes[name]:
                        raise InputError(
                            f"{path}: {name} has shape {entry.get_shape()}, expected {list(self.shapes[name])}"
                        )
                    if entry.get_dtype() not in _DTYPES:
                        raise InputError(f"{path}: {name} is {entry.get_dtype()}; fp16, bf16 or fp32 is needed")
                    self._where[name] = path
        missing = [name for name in self.shapes if name not in self._where]
        if missing:
            raise InputError(f"{self.dir} is incomplete: {len(missing)} tensors missing, first {missing[0]}")

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    def read(
        self, name: str, rows: tuple[int, int], dtype: torch.dtype, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Rows ``[start, stop)`` of a tensor (and of those, columns) in ``dtype``, on the CPU.

        The file is opened anew each time: a mapping kept open would count every page ever read as used memory.
        """
        with _open(self._where[name]) as file:
            entry = file.get_slice(name)
            part = entry[rows[0] : rows[1]] if columns is None else entry[rows[0] : rows[1], columns[0] : columns[1]]
            out = part.to(dtype, copy=True)
            if not torch.isfinite(out.sum()) and not torch.isfinite(out).all():
                what = "NaN or Inf" if not torch.isfinite(part).all() else f"a value that {dtype} cannot hold"
                raise InputError(
                    f"{self._where[name]}: {name} contains {what}: the weights are damaged or not for this dtype"
                )
        return out

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A whole tensor in ``dtype``."""
        return self.read(name, (0, self.shapes[name][0]), dtype)

    def chunks(self) -> list[tuple[str, tuple[int, int]]]:
        """Every tensor in row ranges that one worker can hold."""
        return [
            (name, rows)
            for name, shape in self.shapes.items()
            for rows in row_chunks(shape[0], shape[1] if len(shape) > 1 else 1)
        ]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete .safetensors file: {error}") from None


def model_identity(model_dir: Path | str) -> dict[str, str]:
    """``{"name", "source", "sha256"}`` of a model directory, for result files and checkpoints.

    The hash covers config.json and the weight files (:func:`combined_sha256`). It is taken from ``prepared.json``
    unless a file changed since that was written.
    """
    model = HFModel(model_dir)
    paths = [model.dir / "config.json", *model.files]
    sidecar = model.dir / PREPARED
    digests: dict[str, str] = {}
    if sidecar.is_file():
        recorded = read_json(sidecar).get("files", {})
        written = sidecar.stat().st_mtime_ns
        digests = {path.name: recorded.get(path.name, {}).get("sha256", "") for path in paths}
        for path in paths:
            same_size = recorded.get(path.name, {}).get("bytes") == path.stat().st_size
            if not same_size or path.stat().st_mtime_ns > written:
                digests = {}
                break
    digests = digests or sha256_files(paths)
    return {"name": model.config.name, "source": model.config.source, "sha256": combined_sha256(digests)}
