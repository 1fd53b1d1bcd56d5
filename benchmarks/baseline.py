"""The baseline: Hugging Face transformers, SDPA attention, 16-bit weights, one request at a time.

Method: exactly --output-tokens greedy tokens after a prompt of exactly --input-tokens, EOS ignored; --warmup runs, then
--runs timed ones. A streamer stamps every token when it is on the host: TTFT is t1 - t0, TPOT (tN - t1) / (N - 1).
Output: a result file (llama_engine/measure/result.schema.json) and a table with MBU beside the speed.

    python benchmarks/baseline.py --model-dir models/smollm2-135m-instruct --output results/local/baseline.json
"""

from llama_engine.errors import run_cli
from llama_engine.measure import protocol

if __name__ == "__main__":
    run_cli(lambda: protocol.main(__doc__, engine=False))
