"""Do the engine's answers depend on their company, and what does it cost that they do not?

Method: windows of a public-domain novel (benchmarks/data/README.md), cut to seeded lengths, are each answered alone.
The same prompts are then asked again alone, in batches, one joining every four steps, with so few KV blocks that some
are preempted, and with prefix hits: on the same prompt, and on an answer in a second turn. An answer that differs in
one token has changed. With several --kernels each is judged, and the price is tokens/s of the first over those of the
fastest whose answers no company changed, timed in turn (A B A B).
Output: a result file with "variants" and "price", and a table. Answers that change alone make it INVALID (exit code 1).

    python benchmarks/benchmark_determinism.py --engine-dir engines/smollm2-135m-instruct
    python benchmarks/benchmark_determinism.py --device cuda --kernels auto streaming
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from llama_engine.checkpoint.hf import model_identity
from llama_engine.engine.engine import Engine
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError, run_cli
from llama_engine.measure import determinism, protocol, result
from llama_engine.measure.demand import sampled
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.generation import make_prompts
from llama_engine.measure.telemetry import Telemetry
from llama_engine.measure.workload import BATCH_LEVELS, check_model
from llama_engine.native import load_engine
from llama_engine.report.show import show
from llama_engine.sampling import SamplingParams

TEXT = Path(__file__).with_name("data") / "alice.txt"
console = Console(stderr=True)


def main() -> int:
    parser = protocol.parser_for(__doc__, "results/local/determinism-native.json")
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/smollm2-135m-instruct"))
    parser.add_argument("--prompts", type=int, default=64, help="how many are asked under each condition")
    parser.add_argument("--input-tokens", type=int, default=256, help="of the longest; the shortest have a quarter")
    parser.add_argument("--output-tokens", type=int, default=64, help="new tokens an answer, exactly")
    parser.add_argument("--batch", type=int, nargs="+", help="answers at once (default: those of 8 32 64 that fit)")
    parser.add_argument("--kernels", nargs="+", default=["auto"], help="auto, and on a GPU streaming, tiled; or torch")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each load and kernels")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: seeded draws instead of greedy tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt's draws")
    args = parser.parse_args()
    for name in ("prompts", "output_tokens", "runs"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    result.check_output(args.output, args.force, args.model_dir, args.engine_dir)
    info = load_engine_json(args.engine_dir)
    device = protocol.use_device(args.device, args.threads)
    limit = min(info.engine.max_batch_size, args.prompts)
    batch = args.batch or [n for n in BATCH_LEVELS if n <= limit] or [limit]
    if bad := [n for n in batch if not 1 <= n <= limit]:
        raise InputError(f"--batch {bad[0]}: this engine and --prompts leave room for 1 to {limit}")
    model = model_identity(args.model_dir)
    check_model(info, model)
    windows = make_prompts(args.model_dir, TEXT.read_text(encoding="utf-8"), args.input_tokens, args.prompts)
    sampling = SamplingParams(args.temperature, seed=args.seed) if args.temperature else None
    asked = determinism.Questions.of(windows, args.output_tokens, batch, sampling)
    asked.check(info.engine)
    # just enough for the largest batch, so that several engines fit a GPU beside each other
    blocks = 1 + max(batch) * info.engine.max_blocks_per_sequence
    engines = {
        name: load_engine(args.engine_dir, device=device, kernels=name, threads=args.threads, num_kv_blocks=blocks)
        for name in dict.fromkeys(args.kernels)
    }
    measured = measure(args, asked, engines, device)
    about = protocol.describe(info, next(iter(engines.values())).executor.kernels)
    written = result.new_result("determinism", "native", model=model, engine=about, **measured)
    result.write_result(args.output, written, force=args.force)
    show([written])
    return 0 if written["validity"]["status"] == "VALID" else 1


def measure(
    args: argparse.Namespace, asked: determinism.Questions, engines: dict[str, Engine], device: str
) -> dict[str, Any]:
    """The parts of the result: every condition on every engine, then the price."""
    variants = []
    with Telemetry(device) as telemetry, telemetry.section("all"):
        for name, engine in engines.items():
            found = []
            with console.status(f"{name}: every prompt alone") as status:
                for condition in determinism.conditions(engine, asked):
                    found.append(condition)
                    status.update(f"{name}: {condition['kind']} done, {condition['changed']} answers changed")
            variants.append({"asked": name, "kernels": engine.executor.kernels, "conditions": found})
        with console.status("timing the kernels in turn"):
            price = determinism.price(engines, variants, asked, args.runs)
    again = sum(variant["conditions"][0]["changed"] for variant in variants)
    lengths = [len(prompt) for prompt in asked.prompts]
    workload = {"prompts": len(lengths), "input_tokens_range": [min(lengths), max(lengths)]}
    workload |= {"output_tokens": asked.output_tokens, "batch": list(asked.batch)}
    workload |= {"sampling": sampled(asked.sampling)} if asked.sampling else {}
    return {
        "workload": workload,
        "environment": fingerprint(device),
        "variants": variants,
        "price": price,
        "checks": {"failed_requests": 0, "distinct_outputs": 1 + (again > 0)},
        "telemetry": telemetry.summary("all"),
    }


if __name__ == "__main__":
    run_cli(main)
