"""The INT8 engine, by the baseline's contract: same prompt, same length, same clock.

Method: as benchmarks/baseline.py, then --batch levels with that many requests in one engine at once. MBU is the bytes a
decode step must read over TPOT over the read bandwidth measured in this run; "wall" is the speed at MBU 1.
Output: results/local/optimized-<backend>.json (llama_engine/measure/result.schema.json), or --output, and a table.

    python benchmarks/benchmark_optimized.py --engine-dir engines/smollm2-135m-instruct
"""

from llama_engine.errors import run_cli
from llama_engine.measure import protocol

if __name__ == "__main__":
    run_cli(lambda: protocol.main(__doc__, engine=True))
