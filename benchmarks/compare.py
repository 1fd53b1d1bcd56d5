"""Baseline against engine, interleaved A B A B in one process, with a 95 % bootstrap interval on every ratio.

Method: both stacks are loaded, warmed up, then timed in turn on the same token ids, so drift of the machine hits both.
Ratios are medians over pairs; a verdict is faster or slower only when the whole interval lies on one side of 1. An
INVALID run enters no ratio.
Output: baseline.json, optimized-<backend>.json and comparison.json in the folder --output.

    python benchmarks/compare.py --model-dir models/smollm2-135m-instruct --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import run_cli
from llama_engine.measure import protocol, result
from llama_engine.measure.stacks import TransformersStack
from llama_engine.measure.workload import add_arguments, add_engine_arguments, workload_of
from llama_engine.report.show import show


def main() -> None:
    parser = protocol.parser_for(__doc__, "results/local")
    add_arguments(parser)
    add_engine_arguments(parser)
    args = parser.parse_args()
    device = protocol.use_device(args.device, args.threads)
    info = load_engine_json(args.engine_dir, backend=args.backend)
    names = ("baseline.json", f"optimized-{info.backend}.json", "comparison.json")
    folder = result.check_folder(args.output)
    paths = [result.check_output(folder / name, args.force, args.model_dir, args.engine_dir) for name in names]
    workload = workload_of(args, info)
    baseline = TransformersStack(args.model_dir, device)  # first: an engine's KV cache takes a share of what is free
    engine = protocol.open_engine(args.engine_dir, info, device=device, threads=args.threads)
    measured = protocol.measure([baseline, engine], workload, device)
    before, after = measured["transformers"], measured[engine.name]
    results = (before, after, protocol.comparison(before, after))
    for path, content in zip(paths, results):
        result.write_result(path, content, force=args.force)
    show(results)


if __name__ == "__main__":
    run_cli(main)
