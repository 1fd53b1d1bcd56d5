"""The baseline: Hugging Face transformers, SDPA attention, 16-bit weights, one request at a time.

Method: exactly --output-tokens greedy tokens after a prompt of exactly --input-tokens, EOS ignored; --warmup runs, then
--runs timed ones. A streamer stamps every token when it is on the host: TTFT is t1 - t0, TPOT (tN - t1) / (N - 1).
Output: a result file (llama_engine/measure/result.schema.json) and a table with MBU beside the speed.

    python benchmarks/baseline.py --model-dir models/smollm2-135m-instruct --output results/local/baseline.json
"""

from __future__ import annotations

from llama_engine.errors import run_cli
from llama_engine.measure import protocol, result
from llama_engine.measure.generation import TransformersStack
from llama_engine.measure.show import show


def main() -> None:
    parser = protocol.parser_for(__doc__, "results/local/baseline.json")
    protocol.add_arguments(parser)
    args = parser.parse_args()
    result.check_output(args.output, args.force)
    device = protocol.prepare(args)
    measured = protocol.measure([TransformersStack(args.model_dir, device)], args, device)
    result.write_result(args.output, measured["transformers"], force=args.force)
    show(measured.values())


if __name__ == "__main__":
    run_cli(main)
