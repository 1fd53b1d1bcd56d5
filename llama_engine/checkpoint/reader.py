"""Reading a checkpoint that :func:`llama_engine.checkpoint.convert.convert` wrote, checked against its own record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from llama_engine.checkpoint.packing import LAYOUTS, Layout, unpack
from llama_engine.checkpoint.unified import (
    DTYPES,
    EMBEDDING,
    config_json,
    packed_bits,
    plain_matrices,
    scale_name,
    targets,
    tensor_specs,
)
from llama_engine.config import ModelConfig
from llama_engine.errors import InputError
from llama_engine.files import TOKENIZER_FILES, checked, combined_sha256, read_json, sha256_files
from llama_engine.tensor_files import SAFE_DTYPES, Specs, open_tensors


class Checkpoint:
    """Read a checkpoint that ``convert`` wrote; matrices come back as plain ``[out, in]``, whatever their layout.

    Raises :class:`InputError` for a missing rank, a missing or misshapen tensor, a config.json that does not belong to
    the weights, or one from elsewhere, which lacks the record of its byte layout.
    """

    def __init__(self, checkpoint_dir: Path | str) -> None:
        self.dir = Path(checkpoint_dir)
        if not self.dir.is_dir():
            raise InputError(f"checkpoint {self.dir} does not exist: run scripts/convert_checkpoint.sh")
        path = self.dir / "config.json"
        data = read_json(path)
        if "architectures" in data:  # as Hugging Face spells it
            raise InputError(
                f"{self.dir} is a Hugging Face model, not a TensorRT-LLM checkpoint: convert it first "
                "(scripts/convert_checkpoint.sh)"
            )
        with checked(path):
            self.dtype_name, self.tp_size = data["dtype"], int(data["mapping"]["tp_size"])
            self.quant_algo: str | None = data["quantization"]["quant_algo"]
            self.files = [self.dir / f"rank{rank}.safetensors" for rank in range(self.tp_size)]
            dtype, first = DTYPES[self.dtype_name], self.files[0]
        if missing := [file.name for file in self.files if not file.is_file()]:
            raise InputError(f"{self.dir} is incomplete: {', '.join(missing)} missing; convert again")
        with open_tensors(first) as file:
            self.record: dict[str, Any] = json.loads((file.metadata() or {}).get("llama_engine", "{}"))
        if not self.record:
            raise InputError(
                f"{self.dir}: the byte layout is not recorded; TensorRT-LLM's format does not say which GPU INT8 "
                "weights were packed for. Convert again with scripts/convert_checkpoint.sh"
            )
        with checked(first):
            self.config = ModelConfig.from_dict(self.record["model"])
            self.layout: Layout | None = LAYOUTS[self.record["layout"]] if self.record["layout"] else None
            self.version: str = self.record["trtllm_version"]
            quant_algo = self.record.get("quant_algo", "W8A16" if self.layout else self.quant_algo)
            self.group: int = self.record.get("group_size", 128)
            self.kv_cache: str = self.record.get("kv_cache", "fp16")
            settings = {"dtype": self.dtype_name, "quant_algo": quant_algo, "version": self.version}
            wanted = config_json(self.config, tp=self.tp_size, group=self.group, kv_cache=self.kv_cache, **settings)
        self.plain = plain_matrices(self.config, quant_algo)
        self.bits = packed_bits(quant_algo)
        self.specs: list[Specs] = []  # dtype and shape of every tensor, a rank
        if changed := [key for key, value in wanted.items() if data.get(key) != value]:
            raise InputError(f"{path} does not belong to the weights: {', '.join(changed)} changed; convert again")
        for rank, path in enumerate(self.files):
            every = targets(self.config, rank, self.tp_size)
            specs = tensor_specs(every, dtype, self.layout, self.plain, self.group, self.bits, self.kv_cache)
            self.specs.append(specs)
            with open_tensors(path) as file:
                if missing := specs.keys() - file.keys():
                    raise InputError(f"{path}: tensor {min(missing)} is missing; convert again")
                for name, (kind, shape) in specs.items():
                    entry = file.get_slice(name)
                    found, form = (entry.get_dtype(), entry.get_shape()), (SAFE_DTYPES[kind], list(shape))
                    if found != form:
                        raise InputError(f"{path}: {name} is {found}, expected {form}; convert again")

    @property
    def identity(self) -> dict[str, str]:
        """Name, source and SHA-256 of the model this was converted from, as far as recorded."""
        return {"name": self.config.name, "source": self.config.source, "sha256": self.record.get("source_sha256", "")}

    @property
    def step_nbytes(self) -> int:
        """Bytes of weights that TensorRT-LLM reads in a decode step on the first rank: every tensor but the embedding,
        of which it reads a row a token. Matrices that ``trtllm-build`` is to quantize count as INT8."""
        linear = {target.name for target in targets(self.config, 0, self.tp_size) if target.linear}
        at_build, total = self.quant_algo == "W8A16" and not self.layout, 0
        for name, (dtype, shape) in self.specs[0].items():
            if name != EMBEDDING:
                int8 = at_build and name in linear
                total += math.prod(shape) * (1 if int8 else dtype.itemsize) + shape[0] * dtype.itemsize * int8
        return total

    def sha256(self) -> str:
        """One hash over config.json and the rank files."""
        return combined_sha256(sha256_files([self.dir / "config.json", *self.files]))

    def read(self, name: str, rows: tuple[int, int], rank: int = 0) -> torch.Tensor:
        """Logical rows of a tensor: int8 ``[rows, in]`` for a packed matrix, from and to a multiple of 4 rows,
        else as stored."""
        start, stop = rows
        with open_tensors(self.files[rank]) as file:
            entry = file.get_slice(name)
            if entry.get_dtype() != "I8":
                return entry[start:stop].clone()
            k, n = entry.get_shape()
            # The reported shape is (k, n), of INT4 (k, n / 2); the bytes lie n-major, a row taking so many:
            row = k * self.bits // 8
            first, last = start * row // n, -(-stop * row // n)
            data = entry[first:last].reshape(-1)[start * row - first * n : stop * row - first * n]
            return unpack(data.clone(), stop - start, k, self.layout, self.bits)

    def scale(self, name: str, rank: int = 0) -> torch.Tensor:
        """The scales of a quantized matrix: of a packed one ``[out]`` in the checkpoint's dtype, else its scheme's."""
        with open_tensors(self.files[rank]) as file:
            return file.get_tensor(scale_name(name))


def own_names(path: Path) -> tuple[str, ...]:
    """What a checkpoint that ``convert`` wrote holds, as patterns; nothing for any other directory."""
    try:
        with open_tensors(path / "rank0.safetensors") as file:
            ours = "llama_engine" in (file.metadata() or {})
    except InputError:
        ours = False
    return ("config.json", "rank*.safetensors", *TOKENIZER_FILES) if ours else ()
