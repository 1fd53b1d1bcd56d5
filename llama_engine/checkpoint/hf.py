"""Read a Llama model in Hugging Face format, row range by row range, never a whole shard.

Accepts ``model.safetensors`` or shards with ``model.safetensors.index.json``, in fp16, bf16 or fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llama_engine.checkpoint.hf_config import model_config
from llama_engine.config import ModelConfig
from llama_engine.errors import InputError
from llama_engine.files import checked, combined_sha256, read_json, sha256_files
from llama_engine.tensor_files import open_tensors, row_chunks

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter_config.json"
PREPARED = "prepared.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Hugging Face Llama; ``lm_head.weight`` only where it is not tied to the embedding."""
    hidden, inter = config.hidden_size, config.intermediate_size
    yield EMBEDDING, (config.vocab_size, hidden)
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
        yield LM_HEAD, (config.vocab_size, hidden)


class HFModel:
    """A Hugging Face Llama directory, with the weights that transformers would load from it.

    Construction reads and checks every header; values are read on demand. ``config.tie_word_embeddings`` says whether
    the embedding is the head: a file with a head of its own goes before the flag.

    Raises :class:`InputError` for a missing or half directory, pickled weights, a missing or misshapen tensor, an
    unsupported configuration or dtype; reading raises it for NaN, Inf or a value that fp16 cannot hold.
    """

    def __init__(self, model_dir: Path | str) -> None:
        self.dir = Path(model_dir)
        self._check_kind()
        hf_config = read_json(self.dir / "config.json")
        if hf_config.get("quantization_config"):
            raise InputError(f"{self.dir}/config.json: the weights are already quantized; a 16-bit model is needed")
        prepared = read_json(self.dir / PREPARED) if (self.dir / PREPARED).is_file() else {}
        name, source = prepared.get("name", directory_name(self.dir)), prepared.get("source", "pretrained")
        generation = self.dir / "generation_config.json"
        generation_config = read_json(generation) if generation.is_file() else {}
        with checked(self.dir / "config.json"):
            self.config = model_config(hf_config, generation_config, name=name, source=source)
        self.files = self._weight_files()
        self.shapes = dict(tensor_shapes(replace(self.config, tie_word_embeddings=False)))
        self._where: dict[str, tuple[Path, str]] = {}  # of each tensor: its file, and its name there
        self._check_headers()
        self._tie()
        if missing := [name for name in self.shapes if name not in self._where]:
            raise InputError(f"{self.dir} is incomplete: {len(missing)} tensors missing, first {missing[0]}")

    def _check_kind(self) -> None:
        """Name what the directory is, where it is not a model's."""
        wanted = "give a directory in Hugging Face format (config.json and .safetensors)"
        if self.dir.is_file():
            raise InputError(f"{self.dir} is a {'GGUF ' if self.dir.suffix.lower() == '.gguf' else ''}file: {wanted}")
        if not self.dir.is_dir():
            raise InputError(f"model directory {self.dir} does not exist: run scripts/prepare_model.py or give another")
        if (self.dir / ADAPTER).is_file():
            adapter = read_json(self.dir / ADAPTER)
            kind, base = adapter.get("peft_type", "PEFT"), adapter.get("base_model_name_or_path")
            raise InputError(
                f"{self.dir} is a {kind} adapter of {base}, not a model: merge the two (PEFT's merge_and_unload), save "
                "that and give its directory"
            )
        if not (self.dir / "config.json").is_file() and any(self.dir.glob("*.gguf")):
            raise InputError(f"{self.dir} holds a model as a GGUF file: {wanted}")

    def _weight_files(self) -> list[Path]:
        """In transformers' order: the single file, then the index."""
        names: list[str] = []
        if (self.dir / SINGLE).is_file():
            names = [SINGLE]
        elif (self.dir / INDEX).is_file():
            weight_map = read_json(self.dir / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or any(Path(str(name)).name != name for name in weight_map.values()):
                raise InputError(f"{self.dir / INDEX}: weight_map must map tensors to file names without a path")
            names = sorted(set(weight_map.values()))
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
                    self._where[name] = path, name

    def _tie(self) -> None:
        """Tie embedding and head as transformers does: not where both are in the files and differ."""
        if not self.config.tie_word_embeddings:
            return
        if LM_HEAD in self._where and EMBEDDING not in self._where:
            self._where[EMBEDDING] = self._where[LM_HEAD]
        elif LM_HEAD in self._where:
            for rows in row_chunks(*self.shapes[LM_HEAD]):
                if not torch.equal(*(self.read(name, rows, torch.float32) for name in (EMBEDDING, LM_HEAD))):
                    self.config = replace(self.config, tie_word_embeddings=False)
                    return
        del self.shapes[LM_HEAD]

    def read(
        self, name: str, rows: tuple[int, int], dtype: torch.dtype, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Rows ``[start, stop)`` of a tensor (and of those, columns) in ``dtype``, on the CPU.

        The file is opened anew each time: a mapping kept open would count every page ever read as used memory.
        """
        path, stored = self._where[name]
        with open_tensors(path) as file:
            entry = file.get_slice(stored)
            part = entry[slice(*rows)] if columns is None else entry[slice(*rows), slice(*columns)]
            out = part.to(dtype, copy=True)
            if not torch.isfinite(out.sum()) and not torch.isfinite(out).all():
                if not torch.isfinite(part).all():
                    raise InputError(f"{path}: {stored} contains NaN or Inf: the weights are damaged")
                kind, advice = str(dtype).removeprefix("torch."), "convert with --dtype bfloat16"
                raise InputError(
                    f"{path}: {stored} contains {part.abs().max():.4g}, which {kind} cannot hold: "
                    + (advice if dtype == torch.float16 else "the weights are damaged")
                )
        return out

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A whole tensor in ``dtype``."""
        return self.read(name, (0, self.shapes[name][0]), dtype)


def directory_name(model_dir: Path) -> str:
    """What to call a model: its directory's name, or the repository's for a snapshot in Hugging Face's cache."""
    path = model_dir.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


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
