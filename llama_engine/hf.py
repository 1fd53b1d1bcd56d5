"""Read a Llama model in Hugging Face format, row range by row range, never a whole shard.

Accepts ``model.safetensors`` or shards with ``model.safetensors.index.json``, in fp16, bf16 or fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from llama_engine.config import ModelConfig
from llama_engine.errors import InputError
from llama_engine.files import checked, combined_sha256, open_tensors, read_json, sha256_files

PREPARED = "prepared.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
            raise InputError(f"model directory {self.dir} does not exist: run scripts/prepare_model.py or give another")
        hf_config = read_json(self.dir / "config.json")
        if hf_config.get("quantization_config"):
            raise InputError(f"{self.dir}/config.json: the weights are already quantized; a 16-bit model is needed")
        prepared = read_json(self.dir / PREPARED) if (self.dir / PREPARED).is_file() else {}
        name, source = prepared.get("name", self.dir.resolve().name), prepared.get("source", "pretrained")
        generation = self.dir / "generation_config.json"
        generation_config = read_json(generation) if generation.is_file() else {}
        with checked(self.dir / "config.json"):
            self.config = ModelConfig.from_hf(hf_config, generation_config, name=name, source=source)
        self.files = self._weight_files()
        self.shapes = dict(tensor_shapes(self.config))
        self._where: dict[str, Path] = {}
        self._check_headers()

    def _weight_files(self) -> list[Path]:
        names: list[str] = []
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
        if not names:
            raise InputError(f"{self.dir} has no {SINGLE} and no {INDEX}: the download is incomplete or not a model")
        if missing := [name for name in names if not (self.dir / name).is_file()]:
            raise InputError(
                f"{self.dir} is incomplete: {len(missing)} of {len(names)} shards missing, first {missing[0]}"
            )
        return [self.dir / name for name in names]

    def _check_headers(self) -> None:
        for path in self.files:
            with open_tensors(path) as file:
                for name in self.shapes.keys() & set(file.keys()):
                    entry, shape = file.get_slice(name), list(self.shapes[name])
                    if entry.get_shape() != shape:
                        raise InputError(f"{path}: {name} has shape {entry.get_shape()}, expected {shape}")
                    if entry.get_dtype() not in ("F16", "BF16", "F32"):
                        raise InputError(f"{path}: {name} is {entry.get_dtype()}; fp16, bf16 or fp32 is needed")
                    self._where[name] = path
        if missing := [name for name in self.shapes if name not in self._where]:
            raise InputError(f"{self.dir} is incomplete: {len(missing)} tensors missing, first {missing[0]}")

    def read(
        self, name: str, rows: tuple[int, int], dtype: torch.dtype, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Rows ``[start, stop)`` of a tensor (and of those, columns) in ``dtype``, on the CPU.

        The file is opened anew each time: a mapping kept open would count every page ever read as used memory.
        """
        with open_tensors(self._where[name]) as file:
            entry = file.get_slice(name)
            part = entry[slice(*rows)] if columns is None else entry[slice(*rows), slice(*columns)]
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


def model_identity(model_dir: Path | str) -> dict[str, str]:
    """``{"name", "source", "sha256"}`` of a model directory, for result files and checkpoints.

    The hash covers config.json and the weight files (:func:`combined_sha256`). It is taken from ``prepared.json``
    unless a file changed since that was written.
    """
    model = HFModel(model_dir)
    paths = [model.dir / "config.json", *model.files]
    sidecar = model.dir / PREPARED
    recorded = read_json(sidecar).get("files", {}) if sidecar.is_file() else {}

    def unchanged(path: Path) -> bool:
        now = path.stat()
        same_size = recorded.get(path.name, {}).get("bytes") == now.st_size
        return same_size and now.st_mtime_ns <= sidecar.stat().st_mtime_ns

    if all(map(unchanged, paths)):
        digests = {path.name: recorded[path.name]["sha256"] for path in paths}
    else:
        digests = sha256_files(paths)
    return {"name": model.config.name, "source": model.config.source, "sha256": combined_sha256(digests)}
