"""Decode 1 or 2 sequences with one kernel launch a token: compile, pack pointers, launch ``persistent.cu``.

Interface for an executor::

    if persistent.supported(config, weights):
        decode = PersistentDecode(config, engine, weights, kv, max_rows=2)
        decode.launch(slot_ids, last_token, position, block_tables, sampled, logits)

``launch`` enqueues on the current stream, allocates nothing and can be captured into a CUDA graph. Rows must be one of
:attr:`PersistentDecode.row_counts` (1, 2); pad with the dummy slot (the last row of the slot state), which the
kernel never moves on. For every other row it reads ``last_token[slot]`` and ``position[slot]`` (where that token will
stand), writes its KV, puts the greedy choice into ``sampled[row]`` and ``last_token[slot]`` (-1 and 0 where the logits
are not finite) and adds 1 to ``position[slot]``. Layouts are those of :mod:`llama_engine.kernels`. To understand the
kernel read :mod:`llama_engine.kernels.persistent_reference` first, the same steps in PyTorch. Its results are held to
:class:`llama_engine.model.llama.TorchModel`; the off-switch is not to construct this class.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError, RunError
from llama_engine.kernels import nvrtc
from llama_engine.kernels.common import multiprocessors
from llama_engine.model.rope import rope_tables
from llama_engine.model.schemes import FP8, FP16, INT4, INT8
from llama_engine.model.weights import LINEARS, EngineWeights

SOURCE = Path(__file__).with_name("persistent.cu")
HEADERS = sorted(SOURCE.parent.glob("persistent_*.cuh"))
THREADS = 288
SHARED_BYTES = 232448
STAGE_BYTES = 16384
GROUP = 128  # of K to a scale of INT4
_POINTERS = (
    *("layers", "norms", "cosine", "sine", "embedding", "lm_weight", "lm_scale", "slot_ids", "last_token", "position"),
    *("block_tables", "sampled", "logits", "x_attention", "x_mlp", "qkv", "attended", "hidden", "partial"),
    "sync",
)


def _params(ranks: int) -> ctypes.Structure:
    class Params(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_void_p) for name in _POINTERS),
            *((name, ctypes.c_int) for name in ("table_stride", "num_blocks", "dummy_slot")),
            ("eps", ctypes.c_float),
            *((name, ctypes.c_int) for name in ("rank", "alone")),
            *((name, ctypes.c_void_p * ranks) for name in ("inboxes", "all_logits")),
        )

    return Params(alone=1)


def supported(config: ModelConfig, weights: EngineWeights) -> bool:
    """Whether this kernel can run the model on the device that holds ``weights``: compute capability 9.0, having run on
    no other, and layers of one scheme."""
    device = weights.embedding.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    properties = torch.cuda.get_device_properties(device)
    blocks, half_stage = properties.multi_processor_count, STAGE_BYTES // 2
    linears = [getattr(layer, name) for layer in weights.layers for name in LINEARS]
    scheme = linears[0].scheme
    widths = ((config.hidden_size, half_stage), (config.q_size, STAGE_BYTES), (config.intermediate_size, STAGE_BYTES))
    return (
        properties.shared_memory_per_block_optin >= SHARED_BYTES
        and config.head_size in (64, 128)
        and all(k % (1024 * scheme.packed) == 0 and k <= most for k, most in widths)
        and max(config.intermediate_size, config.qkv_size) <= 256 * blocks
        and config.num_kv_heads <= blocks
        and config.num_heads <= 8 * config.num_kv_heads
        and scheme in (INT8, FP8, INT4)
        and all(linear.scheme is scheme for linear in linears)
        and (scheme is not INT4 or all(linear.group == GROUP for linear in linears))
        and weights.embedding.dtype == torch.float16
        and weights.lm_head.scheme in (INT8, FP16)
    )


def permute(x: torch.Tensor, packed: int = 1) -> torch.Tensor:
    """The order in which the kernel keeps activations ``[..., K]`` of matrices that hold ``packed`` weights a byte:
    ``Split<K>::permuted`` in persistent_matrix.cuh."""
    words = x.shape[-1] // (1024 * packed)
    vector = 4 if words % 4 == 0 else 2 if words % 2 == 0 else 1
    if packed == 1:
        return x.unflatten(-1, (-1, 32, vector, 4)).transpose(-2, -3).flatten(-4).contiguous()
    halves = x.unflatten(-1, (-1, 2, GROUP // 2)).transpose(-2, -3).flatten(-2)  # low nibbles, high ones
    halves = halves.unflatten(-1, (-1, 32, vector, 4)).transpose(-2, -3)  # [..., 2, chunks, vector, 32, 4]
    return halves.movedim(-5, -4).flatten(-5).contiguous()


class PersistentDecode:
    """Compiled kernels and scratch for one model on one device. Only one launch may be in flight (one stream)."""

    def __init__(
        self,
        config: ModelConfig,
        engine: EngineConfig,
        weights: EngineWeights,
        kv: Sequence[torch.Tensor],
        max_rows: int = 2,
        rank: int = 0,
    ) -> None:
        """``kv``: per layer fp16 ``[2, num_blocks, kv_heads, tokens_per_block, head_size]``, contiguous. Of one of
        ``engine.tp_size`` ranks ``config`` and ``weights`` are its share; it runs alone until :meth:`connect`.

        Raises :class:`InputError` where :func:`supported` says no, :class:`RunError` if compilation fails.
        """
        if not supported(config, weights):
            raise InputError("the persistent kernel cannot run this model on this device")
        shape = (2, kv[0].shape[1], config.num_kv_heads, engine.tokens_per_block, config.head_size)
        if len(kv) != config.num_layers or any(
            tuple(t.shape) != shape or t.dtype != torch.float16 or not t.is_contiguous() for t in kv
        ):
            raise InputError(f"kv must be {config.num_layers} contiguous float16 tensors {shape}")
        self.device = weights.embedding.device
        self.grid = multiprocessors(self.device)
        self.row_counts = tuple(r for r in (1, 2) if r <= max_rows and r * config.num_kv_heads <= self.grid)
        self._config, self._rank, self._ranks = config, rank, engine.tp_size
        layers, scheme = weights.layers, weights.layers[0].qkv.scheme
        pointers = [
            [t.data_ptr() for name in LINEARS for t in (getattr(layer, name).weight, getattr(layer, name).scale)]
            + [cache.data_ptr()]
            for layer, cache in zip(layers, kv)
        ]
        norms = [t for layer in layers for t in (layer.input_norm, layer.post_norm)] + [weights.final_norm]
        cosine, sine = (table.to(self.device) for table in rope_tables(config, engine.max_seq_len))
        self._common = {
            "layers": torch.tensor(pointers, dtype=torch.int64, device=self.device),
            "norms": permute(torch.stack([t.float() for t in norms]), scheme.packed),
            "cosine": cosine,
            "sine": sine,
        }
        self._keep = (weights, tuple(kv))
        # Words that blocks exchange. They outlive a launch: flags count layers over all launches of one row count.
        self.scratch = {rows: self._scratch(rows) for rows in self.row_counts}
        self.inboxes = {rows: self._inbox(rows) for rows in self.row_counts}
        self._peers: Sequence[PersistentDecode] = (self,) * self._ranks
        self._params = _params(self._ranks)
        self._params.num_blocks, self._params.eps, self._params.rank = kv[0].shape[1], config.rms_norm_eps, rank
        for name, tensor in self._common.items():
            setattr(self._params, name, tensor.data_ptr())
        self._params.embedding = weights.embedding.data_ptr()
        self._params.lm_weight = weights.lm_head.weight.data_ptr()
        macros = {
            "HIDDEN": config.hidden_size,
            "INTER": config.intermediate_size,
            "LAYERS": config.num_layers,
            "HEADS": config.num_heads,
            "KV_HEADS": config.num_kv_heads,
            "HEAD": config.head_size,
            "VOCAB": config.vocab_size // self._ranks,
            "RANKS": self._ranks,
            "TPB": engine.tokens_per_block,
            "GRID": self.grid,
        }
        if scheme is not INT8:
            macros[scheme.name.upper()] = 1
        if weights.lm_head.scheme is INT8:
            macros["LM_INT8"] = 1
            self._params.lm_scale = weights.lm_head.scale.data_ptr()
        arch = nvrtc.architecture(self.device)
        self._functions = {
            rows: nvrtc.Function(
                nvrtc.compile_cubin(SOURCE, macros | {"ROWS": rows}, arch, HEADERS),
                "decode",
                self.device,
                grid=self.grid,
                threads=THREADS,
                shared=SHARED_BYTES,
                attributes={nvrtc.COOPERATIVE: (1,)},
            )
            for rows in self.row_counts
        }

    def _inbox(self, rows: int) -> torch.Tensor:
        """``Inbox`` of persistent_stream.cuh."""
        words = self._ranks * rows * (2 * self._config.hidden_size + 2)
        return torch.zeros(words, dtype=torch.int64, device=self.device)

    def connect(self, every: Sequence[PersistentDecode], logits: Sequence[torch.Tensor]) -> None:
        """From now on exchange with ``every`` rank, this one among them, in order, which all launch the same from here
        on. Each writes its columns of the logits to each of ``logits``, which :meth:`launch` must then be given. Every
        rank must be idle, with access to the others' memory."""
        if len({(peer.grid, peer.row_counts) for peer in every}) > 1:
            raise RunError("tensor-parallel ranks need GPUs of one kind: the persistent kernel's grids differ")
        self._peers = every
        self._params.alone = 0
        self._params.all_logits[:] = [t.data_ptr() for t in logits]

    def reset(self) -> None:
        """Nothing counted, nothing exchanged. Every rank must be idle, and reset before any goes on."""
        for rows in self.row_counts:
            self.inboxes[rows].zero_()
            for words in self.scratch[rows].values():
                words.zero_()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Launch without the other ranks, for trying the kernel: the results are wrong."""
        before, self._params.alone = self._params.alone, 1
        try:
            yield
        finally:
            self._params.alone = before

    def _scratch(self, rows: int) -> dict[str, torch.Tensor]:
        c = self._config
        group = c.num_heads // c.num_kv_heads
        sizes = {
            "x_attention": (rows, c.hidden_size),
            "x_mlp": (rows, c.hidden_size),
            "qkv": (rows, c.qkv_size),
            "attended": (rows, c.q_size),
            "hidden": (rows, c.intermediate_size),
            "partial": (self.grid, group * (c.head_size + 2)),
            "sync": (160,),
        }
        return {name: torch.zeros(size, dtype=torch.int32, device=self.device) for name, size in sizes.items()}

    def launch(
        self,
        slot_ids: torch.Tensor,
        last_token: torch.Tensor,
        position: torch.Tensor,
        block_tables: torch.Tensor,
        sampled: torch.Tensor,
        logits: torch.Tensor | None = None,
    ) -> None:
        """Decode one token for each of ``slot_ids`` (int32 ``[rows]``); see the module docstring.

        ``last_token`` and ``position`` int32 ``[slots]``, ``block_tables`` int32 ``[slots, blocks]``, ``sampled`` int32
        ``[rows]``, ``logits`` float32 ``[rows, vocab]`` or None; all on the device and contiguous. Raises
        :class:`InputError` for any other dtype or shape.
        """
        rows, slots = slot_ids.numel(), last_token.numel()
        if rows not in self._functions:
            raise InputError(f"the persistent kernel decodes {self.row_counts} rows, not {rows}")
        arguments = {
            "slot_ids": (slot_ids, (rows,)),
            "last_token": (last_token, (slots,)),
            "position": (position, (slots,)),
            "block_tables": (block_tables, (slots, block_tables.shape[-1])),
            "sampled": (sampled, (rows,)),
        }
        if logits is not None:
            arguments["logits"] = (logits, (rows, self._config.vocab_size))
        for name, (tensor, shape) in arguments.items():
            dtype = torch.float32 if name == "logits" else torch.int32
            if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
                raise InputError(f"{name} must be contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            if tensor.device != self.device:
                raise InputError(f"{name} must be on {self.device}, got {tensor.device}")
            setattr(self._params, name, tensor.data_ptr())
        if logits is None:
            self._params.logits = None
        for name, tensor in self.scratch[rows].items():
            setattr(self._params, name, tensor.data_ptr())
        self._params.inboxes[:] = [peer.inboxes[rows].data_ptr() for peer in self._peers]
        self._params.table_stride, self._params.dummy_slot = block_tables.shape[1], slots - 1
        self._functions[rows].launch(self._params)
