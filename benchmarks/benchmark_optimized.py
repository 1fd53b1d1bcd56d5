"""The INT8 engine, by the baseline's contract: same prompt, same length, same clock.

Method: as benchmarks/baseline.py, then --batch levels with that many requests in one engine at once. MBU is the bytes a
decode step must read over TPOT over the read bandwidth measured in this run; "wall" is the speed at MBU 1.
Output: a result file (llama_engine/measure/result.schema.json) and a table.

    python benchmarks/benchmark_optimized.py --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

from llama_engine.errors import run_cli
from llama_engine.measure import protocol, result
from llama_engine.measure.show import show


def main() -> None:
    parser = protocol.parser_for(__doc__, "results/local/optimized-native.json")
    protocol.add_arguments(parser)
    protocol.add_engine_arguments(parser)
    args = parser.parse_args()
    result.check_output(args.output, args.force)
    device = protocol.prepare(args)
    stack = protocol.open_engine(args, device)
    measured = protocol.measure([stack], args, device)
    result.write_result(args.output, measured[stack.name], force=args.force)
    show(measured.values())


if __name__ == "__main__":
    run_cli(main)
