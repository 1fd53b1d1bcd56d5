"""Time each GPU kernel against the bytes it must move, and whole steps against the sum.

Method: each kernel runs once a layer over that layer's own weights and KV cache, in one CUDA graph, so that nothing is
served from L2 that a real step would read from memory; the fastest of 3 replays, divided by the layers. Bytes are what
the kernel must read and write once; the percentage is of the read bandwidth measured in the same run. Weights are
random with the geometry asked for. --tune times the tiles of every matrix first.
Output: a table.

    python benchmarks/kernels.py --rows 1 8 32 64 --context 512
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llama_engine.checkpoint.prepare import GEOMETRIES
from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError, run_cli
from llama_engine.measure import environment
from llama_engine.model.weights import LINEARS, random_weights


def kernel_runs(model: Any, rows: int, context: int) -> dict[str, tuple[Callable[[int], None], int]]:
    """Of each kernel of a decode of ``rows`` rows: what runs it for layer i, and the bytes it must move."""
    from llama_engine.kernels import quant

    c, slots = model.config, torch.arange(rows, dtype=torch.int32, device=model.device)
    eps, layers = c.rms_norm_eps, model.weights.layers
    inner, query = model.digits[c.intermediate_size], model.digits[c.q_size]

    def norm(i: int) -> None:
        hidden = model.digits[c.hidden_size]
        quant.norm(model.x, layers[i].input_norm, eps, hidden, model.a_scale, rows)

    def attend(i: int) -> None:
        model.attention.decode(model.qkv, model.kv[i], slots, model.position, query, model.a_scale, rows)

    runs = {
        "norm + quantize": (norm, rows * c.hidden_size * 4),
        "attention": (attend, rows * (c.kv_nbytes() // c.num_layers * context + c.qkv_size * 2 + c.q_size * 2)),
        "quantize": (
            lambda _: quant.norm(model.hidden, None, eps, inner, model.a_scale, rows),
            rows * c.intermediate_size * 4,
        ),
    }
    for name in (*LINEARS, "lm_head"):
        weights = model.linears(name)[0].nbytes
        n, k = model.linears(name)[0].weight.shape
        width = {"gate_up": 1, "lm_head": 4}.get(name, 2)
        runs[name] = (lambda i, name=name: model.run_linear(name, i, rows), weights + rows * (2 * k + width * n))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-3.1-8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64], help="batch sizes (at most 512)")
    parser.add_argument("--context", type=int, default=512, help="tokens each sequence has in the KV cache")
    parser.add_argument("--prefill", type=int, nargs="*", default=[32, 1024], help="prompt lengths to time whole")
    parser.add_argument("--tune", action="store_true", help="time the tiles of every matrix first")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("benchmarks/kernels.py needs a CUDA GPU")
    if min(args.rows) < 1 or max(args.rows) > 512 or args.context < 1:
        raise InputError("--rows must be 1 to 512 and --context at least 1")
    from llama_engine.gpu import tuner
    from llama_engine.gpu.chain import GpuModel
    from llama_engine.kernels import tiles

    console = Console()
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = environment.measure_read_bandwidth("cuda")["bytes_per_s"]
    config = ModelConfig.from_hf(GEOMETRIES[args.geometry], name=args.geometry, source="synthetic")
    length, slots = max(args.context + 1, *args.prefill, 64), max(64, *args.rows)
    per = -(-(args.context + 1) // 64)
    blocks = max(slots * per, -(-length // 64)) + 1
    engine = EngineConfig(slots, length, max(slots, *args.prefill), 64, num_kv_blocks=blocks)
    model = GpuModel(config, engine, random_weights(config, device), tiles.Tiles(None, ""))
    if args.tune:
        tuner.tune(model, console.print)
    numbers = torch.arange(1, slots * per + 1, dtype=torch.int32, device=device)
    model.block_tables[:slots, :per] = numbers.view(slots, per)
    model.block_tables[0] = torch.arange(engine.max_blocks_per_sequence, dtype=torch.int32, device=device) + 1
    model.position.fill_(args.context)
    table = Table("kernel", "rows", "us", "MB", "GB/s", f"% of {bandwidth / 1e12:.2f} TB/s", title=args.geometry)
    layers = config.num_layers

    def report(name: str, rows: int, ms: float, nbytes: float) -> None:
        rate = nbytes / ms * 1e3
        cells = (f"{1e3 * ms:.1f}", f"{nbytes / 1e6:.1f}", f"{rate / 1e9:.0f}", f"{100 * rate / bandwidth:.0f}")
        table.add_row(name, str(rows), *cells)

    kv_bytes = config.kv_nbytes()
    for rows in args.rows:
        model.position.fill_(args.context)
        for name, (run, nbytes) in kernel_runs(model, rows, args.context).items():
            count = 4 if name == "lm_head" else layers
            ms = tuner.time_graph(lambda run=run, count=count: [run(i) for i in range(count)])
            report(name, rows, ms / count, nbytes)
        step = tuner.time_graph(model.sample_step(rows, context=args.context), repeats=5)
        report("whole decode step", rows, step, model.weights.step_nbytes + rows * args.context * kv_bytes)
        table.add_section()
    for tokens in args.prefill:
        step = tuner.time_graph(model.sample_step(tokens, prefill=True), repeats=5)
        report("whole prefill", tokens, step, model.weights.step_nbytes + tokens * kv_bytes)
    console.print(table)


if __name__ == "__main__":
    run_cli(main)
