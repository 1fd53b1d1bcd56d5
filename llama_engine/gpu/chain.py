"""The Llama forward pass as a chain of fused kernels over static buffers, so that it can be captured into a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError, RunError
from llama_engine.kernels import gemm, library, quant
from llama_engine.kernels.attention import PagedAttention
from llama_engine.kernels.gemm import LM_HEAD_ROWS, LOGITS, RESIDUAL, SILU_MUL, STORE
from llama_engine.kernels.greedy import greedy
from llama_engine.kernels.stream import StreamGemm
from llama_engine.kernels.stream import supported as streaming_supported
from llama_engine.kernels.tiles import Tiles
from llama_engine.model.schemes import BF16, FP8, FP16
from llama_engine.model.weights import LINEARS, EngineWeights, Linear

ALL_LAYERS = slice(None)
EPILOGUES = {"qkv": STORE, "o": RESIDUAL, "gate_up": SILU_MUL, "down": RESIDUAL, "lm_head": LOGITS}
ROW_PADDING = 128  # buffers hold a multiple of the largest tile's rows
LIBRARY_ROWS = 4096  # of a product that cuBLAS leaves to a kernel after it


class GpuModel:
    """Weights, KV cache, slot state and buffers of one model on one GPU.

    Slot state: ``last_token`` and ``position`` int32 ``[max_batch_size + 1]`` and ``block_tables`` int32
    ``[max_batch_size + 1, max_blocks_per_sequence]``; the last slot is the padding's (see :mod:`llama_engine.kernels`).
    """

    def __init__(
        self, config: ModelConfig, engine: EngineConfig, weights: EngineWeights, tiles: Tiles, streaming: bool = True
    ) -> None:
        """``streaming`` lets up to 32 rows run the streaming kernel where the GPU has what it needs."""
        self.config, self.engine_config = config, engine
        self.weights = _checked(config, weights)
        self.device = device = weights.embedding.device
        self.tiles = tiles
        self.streaming = StreamGemm(device) if streaming and streaming_supported(device) else None
        slots = engine.max_batch_size + 1
        capacity = -(-engine.max_num_tokens // ROW_PADDING) * ROW_PADDING
        self.dummy_slot = slots - 1

        def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.last_token, self.position = zeros(slots, dtype=torch.int32), zeros(slots, dtype=torch.int32)
        self.block_tables = zeros(slots, engine.max_blocks_per_sequence, dtype=torch.int32)
        self.x = zeros(capacity, config.hidden_size)
        self.x_ends = zeros(slots + ROW_PADDING, config.hidden_size)
        self.qkv = zeros(capacity, config.qkv_size)
        self.attended = zeros(capacity, config.q_size)
        self.hidden = zeros(capacity, config.intermediate_size)
        self._inputs = self._input_buffers(capacity)
        self.a_scale = zeros(capacity, dtype=torch.float32)
        kept = [linear for name in ("o", "gate_up", "down") for linear in self.linears(name) if library.runs(linear)]
        widest = max((linear.weight.shape[0] for linear in kept), default=0)
        self.product = zeros(min(capacity, LIBRARY_ROWS) * widest)
        self.logits = zeros(engine.max_batch_size, config.vocab_size, dtype=torch.float32)
        self.partials = (zeros(LM_HEAD_ROWS * 8192, dtype=torch.float32), zeros(LM_HEAD_ROWS * 8192, dtype=torch.int32))
        self.workspace = gemm.Workspace(device)
        self.attention = PagedAttention(config, engine, self.block_tables)
        self.kv = self._allocate_kv()

    def _allocate_kv(self) -> list[torch.Tensor]:
        c, e = self.config, self.engine_config
        block = c.kv_nbytes() * e.tokens_per_block
        blocks = e.num_kv_blocks
        if not blocks:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 1 << 30
            blocks = min(e.useful_kv_blocks, int(free * e.kv_cache_free_gpu_memory_fraction) // block)
        if blocks < 2:
            raise RunError(
                f"no GPU memory is left for the KV cache (one block of {e.tokens_per_block} tokens takes "
                f"{block} bytes): free some, or build the engine with a smaller max_num_tokens"
            )
        shape = (2, blocks, c.num_kv_heads, e.tokens_per_block, c.head_size)
        return [torch.zeros(shape, dtype=torch.float16, device=self.device) for _ in range(c.num_layers)]

    def _input_buffers(self, capacity: int) -> dict[tuple[str, str], torch.Tensor]:
        """By scheme and matrix, what holds its activations: the same bytes, but for 16-bit down and lm_head."""
        c = self.config
        widths = dict.fromkeys(("qkv", "gate_up", "lm_head"), c.hidden_size)
        widths |= {"o": c.q_size, "down": c.intermediate_size}
        half = capacity * max(widths.values())
        raw = torch.zeros(2 * half, dtype=torch.int8, device=self.device)
        buffers = {}
        for name, k in widths.items():
            whole = raw[: 2 * capacity * k]
            # Of FP8, down has a place of its own: it is written while gate_up's activations are still read.
            one = raw[half:][: capacity * k] if name == "down" else raw[: capacity * k]
            buffers["int8", name] = whole.view(2, capacity, k)
            buffers["fp8", name] = one.view(FP8.weight_dtype).view(capacity, k)
            buffers["fp16", name] = self.hidden if name == "down" else whole.view(torch.float16).view(capacity, k)
        buffers["fp16", "lm_head"] = torch.zeros(LM_HEAD_ROWS, c.hidden_size, dtype=torch.float16, device=self.device)
        return buffers

    def input_of(self, name: str, linear: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The buffers that hold the activations of ``linear``, called ``name``, in the form that
        :func:`llama_engine.kernels.quant.norm` gives them: with their row scales, or fp16 and None."""
        return self._inputs[linear.scheme.name, name], None if linear.scheme is FP16 else self.a_scale

    def _linear(
        self, name: str, linear: Linear, out: torch.Tensor, rows: int, tile: gemm.Tile | None = None
    ) -> torch.Tensor | None:
        """``linear``, which is called ``name``, over its activations; with ``tile``, only compile that.

        Returns what the caller has still to add to ``out``, if anything.
        """
        a, a_scale = self.input_of(name, linear)
        if tile is None and self.streams(name, linear, rows):
            self.streaming.launch(a, a_scale, linear, out, rows, EPILOGUES[name])
            return None
        chosen = tile or self.tiles.get(name, linear, rows)
        if not chosen.library:
            partials = self.partials if name == "lm_head" else None
            operands = (a, a_scale, linear, out, rows, EPILOGUES[name], chosen, self.workspace, partials)
            gemm.gemm(*operands, compile_only=tile is not None)
        elif tile is None:
            return self._by_library(name, linear, out, None, rows)
        return None

    def _by_library(
        self, name: str, linear: Linear, out: torch.Tensor, out_scale: torch.Tensor | None, rows: int
    ) -> torch.Tensor | None:
        """:meth:`_linear` through cuBLAS; what gate_up leaves takes the form of ``out``, with ``out_scale``."""
        a, a_scale = self.input_of(name, linear)
        n = linear.weight.shape[0]
        step = rows if name == "qkv" else self.product.numel() // n
        for first in range(0, rows, step):
            piece = slice(first, min(first + step, rows))
            count = piece.stop - first
            y = out[piece] if name == "qkv" else self.product[: count * n].view(count, n)
            library.matmul(a[piece], None if a_scale is None else a_scale[piece], linear, y)
            if name == "gate_up":
                scale = None if out_scale is None else out_scale[piece]
                quant.quantize_rows(y, out[piece], scale, count, gated=True)
            elif name != "qkv":
                if count == rows:
                    return y
                out[piece] += y
        return None

    def _gate_up(self, gate_up: Linear, down: Linear, rows: int) -> None:
        """``silu(gate) * up`` as the activations of ``down``."""
        out, scale = self.input_of("down", down)
        if down.scheme is gate_up.scheme and self.tiles.get("gate_up", gate_up, rows).library:
            self._by_library("gate_up", gate_up, out, scale, rows)
            return
        self._linear("gate_up", gate_up, self.hidden, rows)
        if scale is not None:
            quant.quantize_rows(self.hidden, out, scale, rows)

    def streams(self, name: str, linear: Linear, rows: int) -> bool:
        """Whether the streaming kernel runs ``linear``, called ``name``, for so many rows; else it is the others'."""
        return self.streaming is not None and self.streaming.runs(linear, rows, EPILOGUES[name])

    def linears(self, name: str) -> list[Linear]:
        """Every matrix called ``name``."""
        layers = self.weights.layers
        return [self.weights.lm_head] if name == "lm_head" else [getattr(layer, name) for layer in layers]

    def run_linear(self, name: str, index: int, rows: int, tile: gemm.Tile | None = None) -> None:
        """Matrix ``name`` of layer ``index`` as the chain runs it; with ``tile``, compile that without running it."""
        linears = self.linears(name)
        out = {"qkv": self.qkv, "gate_up": self.hidden, "lm_head": self.logits}.get(name, self.x)
        self._linear(name, linears[index % len(linears)], out, rows, tile)

    def _layers(
        self,
        rows: int,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None],
        ends: torch.Tensor | None = None,
        part: slice = ALL_LAYERS,
    ) -> torch.Tensor:
        """``part`` of the decoder layers over ``x[:rows]``; ``attend(kv, out, scale)`` makes the activations of ``o``
        out of ``qkv``.

        Returns the buffer whose first rows hold the result: all of them, or with ``ends`` (int32 ``[n]``) only these,
        which then are all that the last layer computes once its keys and values are cached.
        """
        x = self.x
        eps = self.config.rms_norm_eps
        rest = None  # what x still lacks
        for layer, kv in list(zip(self.weights.layers, self.kv))[part]:
            quant.norm(self.x, layer.input_norm, eps, *self.input_of("qkv", layer.qkv), rows, add=rest)
            self._linear("qkv", layer.qkv, self.qkv, rows)
            query = self.input_of("o", layer.o)
            attend(kv, *query)
            if ends is not None and layer is self.weights.layers[-1]:
                rows = ends.numel()
                quant.quantize_rows(self.attended, *query, rows, ends)
                quant.gather_rows(self.x, ends, self.x_ends, rows)
                x = self.x_ends
            rest = self._linear("o", layer.o, x, rows)
            quant.norm(x, layer.post_norm, eps, *self.input_of("gate_up", layer.gate_up), rows, add=rest)
            self._gate_up(layer.gate_up, layer.down, rows)
            rest = self._linear("down", layer.down, x, rows)
        if rest is not None:
            x[:rows] += rest
        return x

    def _head(self, x: torch.Tensor, rows: int, which: torch.Tensor | None, logits: torch.Tensor) -> int:
        """Logits float32 ``[rows, vocab]`` of ``x`` or ``x[which]``, LM_HEAD_ROWS at most; returns the tiles' count."""
        c, head = self.config, self.weights.lm_head
        quant.norm(x, self.weights.final_norm, c.rms_norm_eps, *self.input_of("lm_head", head), rows, which)
        self._linear("lm_head", head, logits, rows)
        return -(-c.vocab_size // self.tiles.get("lm_head", head, rows).n)

    def _sample(
        self,
        x: torch.Tensor,
        rows: int,
        which: torch.Tensor | None,
        slots: torch.Tensor,
        sampled: torch.Tensor,
        next_position: torch.Tensor | None,
    ) -> None:
        for first in range(0, rows, LM_HEAD_ROWS):
            piece = slice(first, min(rows, first + LM_HEAD_ROWS))
            n = piece.stop - first
            # ``which`` counts from the top of x, an implicit row from the top of the piece
            picked = None if which is None else which[piece]
            num_tiles = self._head(x if which is not None else x[first:], n, picked, self.logits[piece])
            following = None if next_position is None else next_position[piece]
            state = (slots[piece], self.last_token, self.position)
            greedy(self.partials, num_tiles, sampled[piece], *state, n, following)

    def decode(self, slots: torch.Tensor, sampled: torch.Tensor) -> None:
        """One token for each of ``slots`` (int32 ``[rows]``): greedy ids to ``sampled`` and the slots, logits to
        ``logits[:rows]``, positions advanced."""
        rows = slots.numel()
        quant.gather_rows(self.weights.embedding, self.last_token, self.x, rows, slots)
        x = self._layers(
            rows,
            lambda kv, *out: self.attention.decode(self.qkv, kv, slots, self.position, *out, rows),
        )
        self._sample(x, rows, None, slots, sampled, None)

    def prefill(
        self,
        ids: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        tiles: torch.Tensor,
        ends: torch.Tensor,
        sampled: torch.Tensor,
        every_row: bool = False,
        part: slice = ALL_LAYERS,
        decodes: int = 0,
    ) -> None:
        """Run the tokens ``ids`` (int32 ``[T]``, at ``positions`` of ``slots``) in the query ``tiles`` of
        :meth:`PagedAttention.tiles`. ``ends`` int32 ``[3, n]``: the row, slot and next position of each sample.
        ``every_row`` also finishes the rows that are not sampled, for :meth:`all_logits`. ``part``: only these layers,
        the first with the embedding and the last with the sampling.
        The first ``decodes`` rows each decode their slot instead (``ids`` and ``positions`` of them are not read, and
        ``every_row`` is a must); the ``tiles`` count the rows after them."""
        rows, d = ids.numel(), decodes
        if d and not part.start:
            quant.gather_rows(self.weights.embedding, self.last_token, self.x, d, slots)
        if not part.start:
            quant.gather_rows(self.weights.embedding, ids[d:], self.x[d:], rows - d)

        def attend(kv: torch.Tensor, out: torch.Tensor, scale: torch.Tensor | None) -> None:
            if d:
                self.attention.decode(self.qkv, kv, slots, self.position, out, scale, d)
            new = (slots[d:], positions[d:], tiles, self.attended[d:], rows - d)
            self.attention.prefill(self.qkv[d:], kv, *new)
            rest = None if scale is None else scale[d:]
            quant.quantize_rows(self.attended[d:], out[..., d:, :], rest, rows - d)

        count = ends.shape[1]
        x = self._layers(rows, attend, ends[0] if count and not every_row else None, part)
        if count and part.stop is None:
            self._sample(x, count, ends[0] if every_row else None, ends[1], sampled, ends[2])

    def sample_step(self, rows: int, prefill: bool = False, context: int = 256) -> Callable[[], None]:
        """A decode of ``rows`` sequences after ``context`` tokens, or a prefill of ``rows`` tokens, over scratch: for
        timing. Leaves the slot state meaningless."""

        def ints(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        sampled = ints(*[0] * rows)
        if prefill:
            step = min(rows, self.engine_config.max_seq_len)
            starts = range(0, rows, step)
            tiles = [t for first in starts for t in self.attention.tiles(first, 0, min(step, rows - first), 0)]
            positions = ints(*(i % step for i in range(rows)))
            table = ints(*(i for tile in tiles for i in tile)).view(-1, 4)
            inputs = (sampled, sampled, positions, table, ints(rows - 1, 0, 0).view(3, 1))
            return lambda: self.prefill(*inputs, self.last_token)
        slots = ints(*range(rows))  # at most max_batch_size of them

        def decode() -> None:
            self.position.fill_(min(context, self.engine_config.max_seq_len - 1))
            self.decode(slots, sampled)

        return decode

    def all_logits(self, rows: int) -> torch.Tensor:
        """Logits float32 ``[rows, vocab]`` of the prefill that just ran, LM_HEAD_ROWS rows at a time."""
        out = torch.empty((rows, self.config.vocab_size), dtype=torch.float32, device=self.device)
        which = torch.arange(rows, dtype=torch.int32, device=self.device)
        for first in range(0, rows, LM_HEAD_ROWS):
            piece = slice(first, min(rows, first + LM_HEAD_ROWS))
            self._head(self.x, piece.stop - first, which[piece], out[piece])
        return out


def _checked(config: ModelConfig, weights: EngineWeights) -> EngineWeights:
    """``weights`` with embedding and bf16 matrices in fp16. Raises :class:`InputError` for what no kernel runs."""
    device = weights.embedding.device
    before_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
    for i, layer in enumerate(weights.layers):
        for name in LINEARS:
            scheme = getattr(layer, name).scheme
            if "gpu" not in scheme.executors:
                raise InputError(f"layer {i} {name} is {scheme.name}, which no GPU kernel runs: give kernels='torch'")
            if scheme is FP8 and before_fp8:
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
