"""Time the candidate shapes of attention: prefill of long prompts in chunks, and decode over long contexts in batches.

Method: the geometry's attention alone over random KV, as a CUDA graph: all chunks of a prompt in one layer, or a decode
in eight layers, so that nothing is served from L2; the fastest of 3 replays. TFLOP/s count the causal half, GB/s keys
and values once. Each prefill is also held to float32 at a context of 40,960, and asked whether a row's bits depend on
how its prompt is cut; each decode is held to the shape in use. "first" is the first call, compiling and planning.
The shapes in use are the constants of llama_engine/kernels/attention.py.
Output: two tables.

    python benchmarks/attention.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llama_engine.checkpoint.hf_config import model_config
from llama_engine.checkpoint.prepare import GEOMETRIES
from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError, run_cli

CHECKED_CONTEXT, CHECKED_ROWS, LAYERS = 40_960, 2048, 8
DECODES = ((8, 8192), (8, 512), (32, 1024), (64, 160), (256, 1125))  # rows and context


def prefill_candidates() -> dict[str, dict[str, Any]]:
    from llama_engine.kernels.attention import PREFILL, PrefillShape

    shapes = [PREFILL] + [
        PrefillShape(rows, keys, warps, stages, tma)
        for rows, keys, warps, stages, tma in (
            *((64, 64, 4, 2, False), (64, 64, 4, 3, False), (128, 64, 8, 3, False), (128, 64, 8, 4, False)),
            *((128, 128, 8, 2, False), (64, 64, 4, 3, True), (128, 64, 8, 3, True), (128, 64, 8, 4, True)),
        )
    ]
    return {
        f"{s.rows} x {s.keys}, {s.warps} warps, {s.stages} stages" + ", TMA" * s.tma: {"prefill_shape": s}
        for s in dict.fromkeys(shapes)
    }


def decode_candidates() -> list[Any]:
    from llama_engine.kernels.attention import DECODE

    changes: list[dict[str, int]] = [{}, {"stages": 2}, {"stages": 4}, {"warps": 4}, {"keys": 64, "warps": 4}]
    changes += [{"keys": 64}, {"programs": 5}, {"programs": 16}, {"programs": 32}]
    changes += [{"max_chunks": 512, "programs": programs} for programs in (8, 16)]
    changes += [{"max_chunks": 512, "chunk": 128, "programs": programs} for programs in (8, 16)]
    return [replace(DECODE, **change) for change in changes]


class Bench:
    """The attention of one model over random keys, values and new tokens."""

    def __init__(self, config: ModelConfig, tokens: int, chunk: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.length = max(tokens, CHECKED_CONTEXT)
        self.engine = EngineConfig(256, self.length + 64, chunk, num_kv_blocks=1)
        blocks = max(self.engine.max_blocks_per_sequence, max(r * (c // 64 + 1) for r, c in DECODES))
        shape = (2, blocks + 1, config.num_kv_heads, 64, config.head_size)
        self.kv = [torch.randn(shape, dtype=torch.float16, device=self.device) for _ in range(LAYERS)]
        self.fresh = self.kv[-1].clone()
        self.qkv = torch.randn(chunk, config.qkv_size, dtype=torch.float16, device=self.device)
        self.out = torch.zeros(chunk, config.q_size, dtype=torch.float16, device=self.device)
        self.tables = torch.zeros(257, self.engine.max_blocks_per_sequence, dtype=torch.int32, device=self.device)
        self.order = torch.randperm(blocks, device=self.device, dtype=torch.int32) + 1

    def attention(self, **options: Any) -> Any:
        from llama_engine.kernels.attention import PagedAttention

        return PagedAttention(self.config, self.engine, self.tables, **options)

    def _ints(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)

    def prefill(self, attention: Any, start: int, rows: int) -> Callable[[], None]:
        """What runs the chunk of ``rows`` tokens from ``start`` on of the sequence in slot 0, as the chain does."""
        self.tables[0] = self.order[: self.tables.shape[1]]
        slots, positions = self._ints([0] * rows), self._ints(range(start, start + rows))
        tiles = self._ints(attention.tiles(0, start, rows, 0))
        return lambda: attention.prefill(self.qkv, self.kv[0], slots, positions, tiles, self.out, rows)

    def prefill_error(self, attention: Any) -> float:
        """The largest error of the chunk that ends at CHECKED_CONTEXT, relative to the largest value."""
        c, start = self.config, CHECKED_CONTEXT - CHECKED_ROWS
        self.prefill(attention, start, CHECKED_ROWS)()
        blocks = self.tables[0, : CHECKED_CONTEXT // 64]
        keys, values = self.kv[0].transpose(1, 2).index_select(2, blocks).flatten(2, 3)
        rows = torch.arange(0, CHECKED_ROWS, 61, device=self.device)
        hidden = torch.arange(CHECKED_CONTEXT, device=self.device) > (start + rows)[:, None]
        group, worst, largest = c.num_heads // c.num_kv_heads, 0.0, 0.0
        for head in range(c.num_heads):  # q was rotated in place
            span = slice(head * c.head_size, (head + 1) * c.head_size)
            q, k, v = self.qkv[rows, span].float(), keys[head // group].float(), values[head // group].float()
            scores = (q @ k.T / c.head_size**0.5).masked_fill(hidden, float("-inf"))
            want = scores.softmax(-1) @ v
            worst = max(worst, float((self.out[rows, span].float() - want).abs().max()))
            largest = max(largest, float(want.abs().max()))
        return worst / largest

    def depends_on_cut(self, attention: Any) -> bool:
        """Whether rows 1,024 to 2,047 come out otherwise as the second of two chunks than as part of one."""
        fresh = self.qkv.clone()
        self.prefill(attention, 0, 2048)()
        whole = self.out[1024:2048].clone()
        self.qkv[:1024] = fresh[1024:2048]
        self.prefill(attention, 1024, 1024)()
        self.qkv.copy_(fresh)
        return not torch.equal(whole, self.out[:1024])

    def decode(self, attention: Any, rows: int, context: int) -> tuple[Callable[[], None], torch.Tensor]:
        """What runs a decode of ``rows`` sequences in every layer, and the attention's output as fixed point."""
        c, per = self.config, context // 64 + 1
        self.tables[:rows, :per] = self.order[: rows * per].view(rows, per)
        slots, position = self._ints(range(rows)), self._ints([context] * 257)
        digits = torch.zeros((2, 256, c.q_size), dtype=torch.int8, device=self.device)
        scale = torch.zeros(256, device=self.device)

        def run() -> None:
            for kv in self.kv:
                attention.decode(self.qkv, kv, slots, position, digits, scale, rows)

        self.kv[-1].copy_(self.fresh)  # without the new tokens of other decodes
        run()
        return run, (digits[0].int() * 256 + digits[1].int())[:rows] * scale[:rows, None]


def prefill_table(bench: Bench, tokens: list[int], chunks: list[int]) -> Table:
    from llama_engine.gpu.tuner import time_graph

    columns = [(n, chunk) for n in tokens for chunk in chunks if chunk == chunks[0] or n > chunks[0]]
    table = Table("prefill, ms (TFLOP/s)", "first s", "error", "cut", *(f"{n} by {chunk}" for n, chunk in columns))
    c = bench.config
    for name, options in prefill_candidates().items():
        attention, started = bench.attention(**options), time.perf_counter()
        try:
            bench.prefill(attention, 0, chunks[0])()
            torch.cuda.synchronize()
            cells = [f"{time.perf_counter() - started:.2f}", f"{bench.prefill_error(attention):.1e}"]
            cells.append("differs" if bench.depends_on_cut(attention) else "same")
            for n, chunk in columns:
                runs = [bench.prefill(attention, at, min(chunk, n - at)) for at in range(0, n, chunk)]
                ms = time_graph(lambda runs=runs: [run() for run in runs])
                cells.append(f"{ms:.2f} ({2 * n * n * c.num_heads * c.head_size / ms / 1e9:.0f})")
        except Exception as error:  # a shape this GPU has no room for, a library that refuses: the others still count
            cells = [f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"]
        table.add_row(name, *cells)
    return table


def decode_table(bench: Bench) -> Table:
    from llama_engine.gpu.tuner import time_graph

    table = Table("decode, us (GB/s)", "difference", *(f"{rows} x {context}" for rows, context in DECODES))
    wanted: dict[tuple[int, int], torch.Tensor] = {}
    for shape in decode_candidates():
        cells, worst = [], 0.0
        try:
            attention = bench.attention(decode_shape=shape)
            for rows, context in DECODES:
                run, result = bench.decode(attention, rows, context)
                want = wanted.setdefault((rows, context), result)
                worst = max(worst, float((result - want).abs().max() / want.abs().max()))
                ms = time_graph(run) / LAYERS
                nbytes = rows * context * bench.config.kv_nbytes(2) // bench.config.num_layers
                cells.append(f"{1e3 * ms:.1f} ({nbytes / ms / 1e6:.0f})")
        except Exception as error:
            cells.append(f"{type(error).__name__}: {str(error).splitlines()[0][:60]}")
        numbers = f"keys {shape.keys}, {shape.warps} warps, {shape.stages} stages, {shape.programs} programs"
        table.add_row(f"chunk {shape.chunk_size(bench.engine.max_seq_len)}, {numbers}", f"{worst:.1e}", *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 32768], help="prompt lengths")
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048, 8192], help="tokens of a step (at least 2048)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("benchmarks/attention.py needs a CUDA GPU")
    if min(args.chunks) < CHECKED_ROWS or min(args.tokens) < 1:
        raise InputError(f"--chunks must be at least {CHECKED_ROWS} and --tokens at least 1")
    config = model_config(GEOMETRIES[args.geometry], name=args.geometry, source="synthetic")
    bench, console = Bench(config, max(args.tokens), max(args.chunks), torch.device("cuda")), Console(width=200)
    with torch.inference_mode():
        console.print(prefill_table(bench, args.tokens, args.chunks))
        console.print(decode_table(bench))


if __name__ == "__main__":
    run_cli(main)
