"""Time each GPU kernel against the bytes it must move, and whole steps against the sum.

Method: each kernel runs once a layer over that layer's own weights and KV cache, in one CUDA graph, so that nothing is
served from L2 that a real step would read from memory; the fastest of 3 replays, divided by the layers. Bytes are what
the kernel must read and write once (of lm_head, one run over at most 64 rows); the percentage is of the read bandwidth
measured in the same run. Weights are random with the geometry and the scheme asked for. --tune times the tiles of every
matrix first. The sampler, which a step launches when one of its rows draws, is timed by itself, after an argmax, over
logits that make a wide and a narrow distribution.
Output: a table.

    python benchmarks/kernels.py --rows 1 8 32 64 --context 512
    python benchmarks/kernels.py --scheme fp8 --rows 1 8 32 64 128 256 --prefill 1024 4096 16384 --tune
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llama_engine.checkpoint.hf_config import model_config
from llama_engine.checkpoint.prepare import GEOMETRIES
from llama_engine.config import EngineConfig
from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure import environment
from llama_engine.model.schemes import FP8, FP16, INT4, INT8
from llama_engine.model.weights import LINEARS, random_weights

SCHEMES = {scheme.name: scheme for scheme in (INT8, FP8, INT4, FP16)}


def kernel_runs(model: Any, rows: int, context: int) -> dict[str, tuple[Callable[[int], None], int]]:
    """Of each kernel of a decode of ``rows`` rows: what runs it for layer i, and the bytes it must move."""
    from llama_engine.kernels import quant
    from llama_engine.kernels.gemm import LM_HEAD_ROWS

    c, slots = model.config, torch.arange(rows, dtype=torch.int32, device=model.device)
    eps, layers = c.rms_norm_eps, model.weights.layers
    scheme = layers[0].qkv.scheme
    each = 1 if scheme is FP8 else 2  # bytes of an activation

    def norm(i: int) -> None:
        quant.norm(model.x, layers[i].input_norm, eps, *model.linears.input_of("qkv", layers[i].qkv, rows), rows)

    def attend(i: int) -> None:
        out = model.linears.input_of("o", layers[i].o, rows)
        model.attention.decode(model.qkv, model.kv[i], slots, model.position, *out, rows)

    runs = {
        "norm + quantize": (norm, rows * c.hidden_size * (2 + each)),
        "attention": (attend, rows * (c.kv_nbytes(2) // c.num_layers * context + c.qkv_size * 2 + c.q_size * each)),
    }
    if model.linears.input_of("down", layers[0].down, rows)[1] is not None:

        def quantize(i: int) -> None:
            quant.quantize_rows(model.linears.hidden, *model.linears.input_of("down", layers[i].down, rows), rows)

        runs["quantize"] = quantize, rows * c.intermediate_size * (2 + each)
    for name in (*LINEARS, "lm_head"):
        count = min(rows, LM_HEAD_ROWS) if name == "lm_head" else rows
        weights = model.linears.named(name)[0].nbytes
        n, k = model.linears.named(name)[0].shape
        width = {"gate_up": 1, "lm_head": 4}.get(name, 2)
        run = lambda i, name=name, count=count: model.run_linear(name, i, count)  # noqa: E731
        runs[name] = (run, weights + count * (each * k + width * n))
    return runs


def sampler_runs(rows: int, vocab: int, device: torch.device, cuts: list[tuple]) -> dict[str, Callable[[], None]]:
    """The sampler over ``rows`` rows of ``vocab`` logits, by what the rows ask for and how wide they spread. ``cuts``:
    programs a row and warps a program, None for the engine's own choice."""
    from llama_engine.kernels import sampler as module
    from llama_engine.kernels.sampler import WARPS, Sampler
    from llama_engine.sampling import SamplingParams

    asked: dict[str, dict[str, Any]] = {
        "T 0.8": {},
        "top-p 0.95": {"top_p": 0.95},
        "top-k 50, top-p 0.95": {"top_k": 50, "top_p": 0.95},
        "top-p 0.95, penalties": {"top_p": 0.95, "repetition_penalty": 1.001},
    }
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    sampled, last, position = (torch.zeros(rows + 1, dtype=torch.int32, device=device) for _ in range(3))
    generator = torch.Generator(device).manual_seed(0)
    runs = {}
    for spread, name in ((1.3, "wide"), (4.0, "narrow")):
        logits = spread * torch.randn(rows, vocab, device=device, generator=generator)
        for title, options in asked.items():
            sampler = Sampler(rows, rows, vocab, device)
            for slot in range(rows):
                params = SamplingParams(temperature=0.8, seed=slot, **options)
                for target, values in sampler.updates(slot, params, range(1000), range(100)):
                    target[: values.size].copy_(torch.from_numpy(values))

            for split, warps in cuts:

                def run(
                    sampler: Sampler = sampler, logits: torch.Tensor = logits, split: Any = split, warps: Any = warps
                ) -> None:
                    module.SPLITS, module.WARPS = split, warps or WARPS
                    sampled[:rows] = logits.argmax(-1)
                    sampler.launch(logits, sampled, slots, last, position, rows)

                cut = "".join(f", {n} {what}" for n, what in ((split, "programs"), (warps, "warps")) if n)
                runs[f"sampler{cut}, {name}: {title}"] = run
        runs[f"argmax, {name}"] = lambda logits=logits: sampled[:rows].copy_(
            logits.argmax(-1)
        )  # which the above include
    return runs


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llama-3.1-8b")
    parser.add_argument("--scheme", choices=[*SCHEMES], default="int8", help="of the layers' matrices (default: int8)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64], help="batch sizes (at most 512)")
    parser.add_argument("--context", type=int, default=512, help="tokens each sequence has in the KV cache")
    parser.add_argument("--prefill", type=int, nargs="*", default=[32, 1024], help="prompt lengths to time whole")
    parser.add_argument("--tune", action="store_true", help="time the tiles of every matrix first")
    parser.add_argument(
        "--sampler-parts", type=int, nargs="+", default=[None], choices=[1, 2, 4, 8, 16, 32], help="programs a row"
    )
    parser.add_argument("--sampler-warps", type=int, nargs="+", default=[None], choices=[4, 8, 16], help="a program")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("benchmarks/kernels.py needs a CUDA GPU")
    if min(args.rows) < 1 or max(args.rows) > 512 or args.context < 1:
        raise InputError("--rows must be 1 to 512 and --context at least 1")
    from llama_engine.gpu import tuner
    from llama_engine.gpu.chain import GpuModel
    from llama_engine.kernels import tiles

    console = Console()
    cuts = list(itertools.product(args.sampler_parts, args.sampler_warps))
    device = torch.device("cuda", torch.cuda.current_device())
    bandwidth = environment.measure_read_bandwidth("cuda")["bytes_per_s"]
    config = model_config(GEOMETRIES[args.geometry], name=args.geometry, source="synthetic")
    length, batch = max(args.context + 1, *args.prefill, 64), max(64, *args.rows)
    # Every sequence has blocks of its own for its context; a prompt takes them all, from the first on.
    each, tokens = -(-(args.context + 1) // 64), max(batch, *args.prefill)
    blocks = max(batch * each, -(-length // 64))
    engine = EngineConfig(batch, length, tokens, 64, num_kv_blocks=blocks + 1)
    weights = random_weights(config, device, scheme=SCHEMES[args.scheme])
    model = GpuModel(config, engine, weights, tiles.Tiles(None, ""))
    if args.tune:
        tuner.tune(model, console.print)
    firsts = torch.arange(batch, device=device)[:, None] * each
    places = torch.arange(engine.max_blocks_per_sequence, device=device)
    model.block_tables[:batch] = 1 + (firsts + places) % blocks
    model.position.fill_(args.context)
    share = f"% of {bandwidth / 1e12:.2f} TB/s"
    table = Table("kernel", "rows", "us", "MB", "GB/s", share, title=f"{args.geometry}, {args.scheme}")
    layers = config.num_layers

    def report(name: str, rows: int, ms: float, nbytes: float) -> None:
        rate = nbytes / ms * 1e3
        cells = (f"{1e3 * ms:.1f}", f"{nbytes / 1e6:.1f}", f"{rate / 1e9:.0f}", f"{100 * rate / bandwidth:.0f}")
        table.add_row(name, str(rows), *cells)

    kv_bytes = config.kv_nbytes(2)
    for rows in args.rows:
        model.position.fill_(args.context)
        for name, (run, nbytes) in kernel_runs(model, rows, args.context).items():
            count = 4 if name == "lm_head" else layers
            ms = tuner.time_graph(lambda run=run, count=count: [run(i) for i in range(count)])
            report(name, rows, ms / count, nbytes)
        for name, run in sampler_runs(rows, config.vocab_size, device, cuts).items():
            report(name, rows, tuner.time_graph(run, repeats=10), rows * config.vocab_size * 4)
        step = tuner.time_graph(model.sample_step(rows, context=args.context), repeats=5)
        report("whole decode step", rows, step, model.weights.step_nbytes + rows * args.context * kv_bytes)
        table.add_section()
    for tokens in args.prefill:
        step = tuner.time_graph(model.sample_step(tokens, prefill=True), repeats=5)
        report("whole prefill", tokens, step, model.weights.step_nbytes + tokens * kv_bytes)
    console.print(table)


if __name__ == "__main__":
    run_cli(main)
