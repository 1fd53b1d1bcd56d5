"""Baseline against engine, interleaved A B A B in one process, with a 95 % bootstrap interval on every ratio.

Method: both stacks are loaded, warmed up, then timed in turn on the same token ids, so drift of the machine hits both.
Ratios are medians over pairs; a verdict is faster or slower only when the whole interval lies on one side of 1. An
INVALID run enters no ratio.
Output: baseline.json, optimized-<backend>.json and comparison.json in the folder --output.

    python benchmarks/compare.py --model-dir models/smollm2-135m-instruct --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from llama_engine.errors import run_cli
from llama_engine.measure import protocol, result
from llama_engine.measure.generation import EngineStack, TransformersStack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    protocol.add_arguments(parser, "results/local")
    protocol.add_engine_arguments(parser)
    args = parser.parse_args()
    folder: Path = args.output
    device = protocol.prepare(args)
    backend = protocol.backend_of(args)
    paths = [folder / name for name in ("baseline.json", f"optimized-{backend}.json", "comparison.json")]
    for path in paths:
        result.check_output(path, args.force)
    baseline = TransformersStack(args.model_dir, device)
    engine, about = protocol.open_engine(args.engine_dir, backend, device, args.threads)
    protocol.check_same_model(args.model_dir, about)
    measured = protocol.measure([baseline, engine], args, device, about)
    before, after = measured[baseline.name], measured[engine.name]
    if isinstance(engine, EngineStack):
        protocol.add_levels(after, engine, args, device)
    compared = protocol.comparison(before, after)
    for path, content in zip(paths, (before, after, compared)):
        result.write_result(path, content, force=args.force)
    out = Console()
    for content in (before, after):
        protocol.print_result(content, out)
    for name, ratio in compared["speedup"].items():
        low, high = ratio["ci95"]
        out.print(f"{name:<20} {ratio['ratio']:.2f}x  95 % [{low:.2f}, {high:.2f}]  {ratio['verdict']}")


if __name__ == "__main__":
    run_cli(main)
