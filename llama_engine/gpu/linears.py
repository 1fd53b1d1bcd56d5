"""The linear layers of a GPU: the buffers of their activations, and which kernel runs a matrix for so many rows."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from llama_engine.config import ModelConfig
from llama_engine.errors import InputError
from llama_engine.kernels import gemm, library, quant
from llama_engine.kernels.common import has_e4m3
from llama_engine.kernels.gemm import LM_HEAD_ROWS
from llama_engine.kernels.gemm_kernel import LOGITS, RESIDUAL, SILU_MUL, STORE
from llama_engine.kernels.stream import StreamGemm
from llama_engine.kernels.stream import supported as streaming_supported
from llama_engine.kernels.tiles import Tiles
from llama_engine.model.schemes import BF16, FP8, FP16, INT4, INT8
from llama_engine.model.weights import LINEARS, EngineWeights, Linear

EPILOGUES = {"qkv": STORE, "o": RESIDUAL, "gate_up": SILU_MUL, "down": RESIDUAL, "lm_head": LOGITS}
LIBRARY_ROWS = 4096  # of a product that cuBLAS leaves to a kernel after it


class Linears:
    """Runs the matrices of ``weights`` over activations that a norm or quantization left in :meth:`input_of`.

    ``capacity``: rows of the activations. ``hidden`` fp16 ``[capacity, intermediate_size]`` is gate_up's result where
    down is not of its scheme, and else down's input. ``streaming`` lets up to 32 rows run the streaming kernel where
    the GPU has what it needs. ``split``: o and down give partial sums, of a tensor-parallel rank, and store them.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: EngineWeights,
        tiles: Tiles,
        hidden: torch.Tensor,
        streaming: bool,
        split: bool = False,
    ) -> None:
        self.epilogues = EPILOGUES | (dict.fromkeys(("o", "down"), STORE) if split else {})
        self.config, self.weights, self.tiles, self.hidden = config, weights, tiles, hidden
        self.device, capacity = hidden.device, hidden.shape[0]
        self.streaming = StreamGemm(self.device) if streaming and streaming_supported(self.device) else None
        self._inputs = self._input_buffers(capacity)
        self.a_scale = torch.zeros(capacity, dtype=torch.float32, device=self.device)
        kept = [linear for name in ("o", "gate_up", "down") for linear in self.named(name) if library.runs(linear)]
        widest = max((linear.weight.shape[0] for linear in kept), default=0)
        self.product = torch.zeros(min(capacity, LIBRARY_ROWS) * widest, dtype=torch.float16, device=self.device)
        packed = [math.prod(linear.shape) for name in LINEARS for linear in self.named(name) if linear.scheme is INT4]
        room = max(packed, default=0) if self.device.type == "cuda" else 0  # for cuBLAS, which has no such form
        self.scratch = torch.empty(room, dtype=torch.float16, device=self.device)
        best = torch.zeros(LM_HEAD_ROWS * 8192, dtype=torch.float32, device=self.device)
        self.partials = best, torch.zeros_like(best, dtype=torch.int32)  # of lm_head's tiles
        self.workspace = gemm.Workspace(self.device)

    def _input_buffers(self, capacity: int) -> dict[tuple[str, str], torch.Tensor]:
        """By scheme and matrix, what holds its activations: the same bytes, but for 16-bit down and lm_head."""
        c = self.config
        widths = dict.fromkeys(("qkv", "gate_up", "lm_head"), c.hidden_size)
        widths |= {"o": c.q_size, "down": c.intermediate_size}
        most = capacity * max(widths.values())
        raw = torch.zeros(2 * most, dtype=torch.int8, device=self.device)
        buffers = {}
        for name, k in widths.items():
            whole = raw[: 2 * capacity * k]
            # Of FP8, down has a place of its own: it is written while gate_up's activations are still read.
            one = raw[most:][: capacity * k] if name == "down" else raw[: capacity * k]
            buffers["int8", name] = whole.view(2, capacity, k)
            buffers["fp8", name] = one.view(FP8.weight_dtype).view(capacity, k)
            buffers["fp16", name] = self.hidden if name == "down" else whole.view(torch.float16).view(capacity, k)
        buffers["fp16", "lm_head"] = torch.zeros(LM_HEAD_ROWS, c.hidden_size, dtype=torch.float16, device=self.device)
        return buffers

    def input_of(self, name: str, linear: Linear, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The buffers that hold ``rows`` rows of activations of ``linear``, called ``name``, in the form that
        :func:`llama_engine.kernels.quant.norm` gives them: with their row scales, or fp16 and None."""
        form = linear.scheme.name
        if linear.scheme is INT4:  # what the kernel multiplies that runs so many rows
            form = INT8.name if self.streams(name, linear, rows) else FP16.name
        return self._inputs[form, name], None if form == FP16.name else self.a_scale

    def run(
        self, name: str, linear: Linear, out: torch.Tensor, rows: int, tile: gemm.Tile | None = None
    ) -> torch.Tensor | None:
        """``linear``, which is called ``name``, over its activations; with ``tile``, only compile that.

        Returns what the caller has still to add to ``out``, if anything.
        """
        a, a_scale = self.input_of(name, linear, rows)
        if tile is None and self.streams(name, linear, rows):
            self.streaming.launch(a, a_scale, linear, out, rows, self.epilogues[name])
            return None
        chosen = tile or self.tiles.get(name, linear, rows)
        if not chosen.library:
            partials = self.partials if name == "lm_head" else None
            operands = (a, a_scale, linear, out, rows, self.epilogues[name], chosen, self.workspace, partials)
            gemm.gemm(*operands, compile_only=tile is not None)
        elif tile is None:
            return self._by_library(name, linear, out, None, rows)
        return None

    def _by_library(
        self, name: str, linear: Linear, out: torch.Tensor, out_scale: torch.Tensor | None, rows: int
    ) -> torch.Tensor | None:
        """:meth:`run` through cuBLAS; what gate_up leaves takes the form of ``out``, with ``out_scale``."""
        a, a_scale = self.input_of(name, linear, rows)
        n = linear.weight.shape[0]
        stored = self.epilogues[name] == STORE
        step = rows if stored else self.product.numel() // n
        for first in range(0, rows, step):
            piece = slice(first, min(first + step, rows))
            count = piece.stop - first
            y = out[piece] if stored else self.product[: count * n].view(count, n)
            library.matmul(a[piece], None if a_scale is None else a_scale[piece], linear, y, self.scratch)
            if name == "gate_up":
                scale = None if out_scale is None else out_scale[piece]
                quant.quantize_rows(y, out[piece], scale, count, gated=True)
            elif not stored:
                if count == rows:
                    return y
                out[piece] += y
        return None

    def gate_up(self, gate_up: Linear, down: Linear, rows: int) -> None:
        """``silu(gate) * up`` as the activations of ``down``."""
        out, scale = self.input_of("down", down, rows)
        if down.scheme is gate_up.scheme and self.tiles.get("gate_up", gate_up, rows).library:
            self._by_library("gate_up", gate_up, out, scale, rows)
            return
        self.run("gate_up", gate_up, self.hidden, rows)
        if scale is not None:
            quant.quantize_rows(self.hidden, out, scale, rows)

    def streams(self, name: str, linear: Linear, rows: int) -> bool:
        """Whether the streaming kernel runs ``linear``, called ``name``, for so many rows; else it is the others'."""
        return self.streaming is not None and self.streaming.runs(linear, rows, self.epilogues[name])

    def named(self, name: str) -> list[Linear]:
        """Every matrix called ``name``."""
        layers = self.weights.layers
        return [self.weights.lm_head] if name == "lm_head" else [getattr(layer, name) for layer in layers]


def checked_weights(config: ModelConfig, weights: EngineWeights) -> EngineWeights:
    """``weights`` with embedding and bf16 matrices in fp16. Raises :class:`InputError` for what no kernel runs."""
    device = weights.embedding.device
    for i, layer in enumerate(weights.layers):
        for name in LINEARS:
            scheme = getattr(layer, name).scheme
            if "gpu" not in scheme.executors:
                raise InputError(f"layer {i} {name} is {scheme.name}, which no GPU kernel runs: give kernels='torch'")
            if scheme is FP8 and not has_e4m3(device):
                arch = "sm{}{}".format(*torch.cuda.get_device_capability(device))
                raise InputError(
                    f"layer {i} {name} is fp8, and this GPU is {arch}: FP8 needs sm89 (Ada) or later. Convert with "
                    "--use_weight_only, or run with --device cpu"
                )
    for name, size in (("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)):
        if size % 32:
            raise InputError(f"{name} {size} is not a multiple of 32: give kernels='torch'")

    def fp16(linear: Linear) -> Linear:
        return Linear(linear.weight.to(torch.float16)) if linear.scheme is BF16 else linear

    layers = [replace(layer, **{name: fp16(getattr(layer, name)) for name in LINEARS}) for layer in weights.layers]
    return EngineWeights(weights.embedding.to(torch.float16), layers, weights.final_norm, fp16(weights.lm_head))
