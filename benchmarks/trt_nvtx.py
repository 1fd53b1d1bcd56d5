"""Either engine, native or TensorRT-LLM, under NVTX ranges for Nsight Systems. No speed is taken from a profiled run.

Method: one warm-up marked "warm-up", then one generation in which the prefill and each decode step are marked.
scripts/profile_nsight.sh runs it under nsys.
Output: a small JSON that says what was run (and, with --torch-profiler, PyTorch's own profile of it).

    python benchmarks/trt_nvtx.py --output build/trt_nvtx.json
"""

from llama_engine.errors import run_cli
from llama_engine.measure import profile

if __name__ == "__main__":
    run_cli(lambda: profile.main(__doc__, engine=True))
