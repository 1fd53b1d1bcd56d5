"""The weights of a built engine: what ``build_engine`` packs and every executor reads.

All linear weights are stored ``[out_features, in_features]`` row-major, the order a GEMV streams, on CPU and GPU
alike. INT8 and FP8 rows carry one float32 scale a row: ``w[n, k] = scale[n] * q[n, k]``; INT4 rows are packed in groups
with a float16 scale each, as :mod:`llama_engine.model.schemes` lays down. Fused matrices are stacked
rows: ``qkv = [Q; K; V]`` and ``gate_up = [gate; up]``. Each matrix has a scheme of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_engine.config import ModelConfig
from llama_engine.engine_dir import WEIGHTS_FILE
from llama_engine.errors import InputError
from llama_engine.model.schemes import E4M3_MAX, INT4, INT8, Scheme, default_group, group_size, held_shape, scheme_of
from llama_engine.tensor_files import open_tensors

LINEARS = ("qkv", "o", "gate_up", "down")


@dataclass
class Linear:
    """A weight matrix ``[N, K]`` as its scheme stores it and, where it has one, the ``scale``.

    ``weight`` is ``[N, K]`` (of INT4 ``[N, K / 2]``), ``scale`` float32 ``[N]`` (of INT4 float16 ``[N, K / group]``).
    Raises :class:`InputError` for tensors that belong to no scheme.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.scheme: Scheme = scheme_of(self.weight, self.scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix that the stored values stand for, ``[N, K]`` in ``dtype``."""
        return self.scheme.dequantize(self.weight, self.scale, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), whatever the scheme stores."""
        rows, stored = self.weight.shape
        return rows, stored * self.scheme.packed

    @property
    def group(self) -> int:
        """Inputs of a row that share a scale, 0 where all of them do."""
        return group_size(self.weight, self.scale) if self.scheme.scale == "group" else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix, its scales included: what one decode step reads of it."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)


@dataclass
class LayerWeights:
    """One decoder layer. Norms are ``[hidden]`` in the checkpoint's dtype."""

    input_norm: torch.Tensor
    qkv: Linear
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass
class EngineWeights:
    """All tensors of an engine on one device."""

    embedding: torch.Tensor  # [vocab, hidden], checkpoint dtype
    layers: list[LayerWeights]
    final_norm: torch.Tensor  # [hidden]
    lm_head: Linear  # [vocab, hidden], of a tensor-parallel rank its rows of that

    @property
    def step_nbytes(self) -> int:
        """Bytes one decode step must read, KV excluded: every linear layer, the norms and lm_head once.

        The embedding is a gather of one row a token and is not counted.
        """
        total = self.final_norm.nbytes + self.lm_head.nbytes
        for layer in self.layers:
            total += layer.input_norm.nbytes + layer.post_norm.nbytes
            total += sum(getattr(layer, name).nbytes for name in LINEARS)
        return total


def stored_name(name: str, rank: int, ranks: int) -> str:
    """What :data:`WEIGHTS_FILE` calls the tensor ``name`` of one of ``ranks``; norms and embedding they all share."""
    kind = name.removesuffix(".scale").rpartition(".")[2]
    return f"rank{rank}.{name}" if ranks > 1 and kind in (*LINEARS, "lm_head") else name


def tensor_names(config: ModelConfig, ranks: int = 1) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of one rank; scaled linears also have ``<name>.scale`` ``[N]``.

    qkv, gate_up and lm_head are split by rows, o and down by columns (:func:`stored_name` says where they lie).
    """
    vocab, hidden = config.vocab_size, config.hidden_size
    config = config.share(ranks)
    yield "embedding", (vocab, hidden)
    for i in range(config.num_layers):
        yield f"layers.{i}.input_norm", (hidden,)
        yield f"layers.{i}.qkv", (config.qkv_size, hidden)
        yield f"layers.{i}.o", (hidden, config.q_size)
        yield f"layers.{i}.post_norm", (hidden,)
        yield f"layers.{i}.gate_up", (2 * config.intermediate_size, hidden)
        yield f"layers.{i}.down", (hidden, config.intermediate_size)
    yield "final_norm", (hidden,)
    yield "lm_head", (vocab // ranks, hidden)


def load_weights(
    engine_dir: Path, config: ModelConfig, device: torch.device | str, rank: int = 0, ranks: int = 1
) -> EngineWeights:
    """Read what ``engine.safetensors`` holds of a rank onto ``device``; ``config`` is the whole model's.

    Raises :class:`InputError` for a missing or misshapen tensor.
    """
    path = Path(engine_dir) / WEIGHTS_FILE
    tensors: dict[str, torch.Tensor] = {}
    with open_tensors(path, str(device)) as file:
        present = set(file.keys())
        for name, shape in tensor_names(config, ranks):
            stored = stored_name(name, rank, ranks)
            if stored not in present:
                raise InputError(f"{path}: tensor {stored!r} is missing")
            tensors[name] = file.get_tensor(stored)
            held = held_shape(INT4, shape)[0] if tensors[name].dtype == INT4.weight_dtype else shape
            if tuple(tensors[name].shape) != held:
                raise InputError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, expected {held}")
            if f"{stored}.scale" in present:
                tensors[f"{name}.scale"] = file.get_tensor(f"{stored}.scale")

    return _assemble(tensors, config)


def random_weights(
    config: ModelConfig, device: torch.device | str, seed: int = 0, scheme: Scheme = INT8
) -> EngineWeights:
    """Seeded random weights of ``config``'s geometry, scaled so that activations stay in fp16's range.

    ``scheme`` is that of the layers' matrices; the rest is fp16.
    """
    bits = {"device": device, "generator": torch.Generator(device).manual_seed(seed)}
    tensors = {}
    for name, shape in tensor_names(config):
        if len(shape) == 1:
            tensors[name] = (torch.rand(shape, **bits) + 0.5).half()
        elif name.rpartition(".")[2] in LINEARS:
            if scheme is INT4:
                tensors[name] = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, **bits)
                scale = torch.rand(held_shape(INT4, shape, default_group(shape[1:]))[1], **bits) * 0.2 + 0.1
                tensors[f"{name}.scale"] = (scale / shape[1] ** 0.5).half()
                continue
            if scheme is INT8:
                tensors[name] = torch.randint(-127, 128, shape, dtype=torch.int8, **bits)
            else:
                values = torch.randn(shape, dtype=torch.float16, **bits) * 100
                tensors[name] = values.clamp_(-E4M3_MAX, E4M3_MAX).to(scheme.weight_dtype)
            scale = (torch.rand(shape[0], **bits) * 0.02 + 0.005) / shape[1] ** 0.5
            if scheme.scale:
                tensors[f"{name}.scale"] = scale
            else:
                tensors[name] *= scale[:, None].to(scheme.weight_dtype)
        else:
            std = config.hidden_size**-0.5 if name == "lm_head" else 1
            tensors[name] = torch.randn(shape, dtype=torch.float16, **bits) * std
    if config.tie_word_embeddings:
        tensors["lm_head"] = tensors["embedding"]
    return _assemble(tensors, config)


def _assemble(tensors: dict[str, torch.Tensor], config: ModelConfig) -> EngineWeights:
    """The tensors of :func:`tensor_names`, and of the scaled ones the scales."""

    def linear(name: str) -> Linear:
        return Linear(tensors[name], tensors.get(f"{name}.scale"))

    layers = [
        LayerWeights(
            input_norm=tensors[f"layers.{i}.input_norm"],
            post_norm=tensors[f"layers.{i}.post_norm"],
            **{name: linear(f"layers.{i}.{name}") for name in LINEARS},
        )
        for i in range(config.num_layers)
    ]
    return EngineWeights(tensors["embedding"], layers, tensors["final_norm"], linear("lm_head"))
