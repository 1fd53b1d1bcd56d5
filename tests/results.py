"""A folder of small result files, for the tests of what reads them."""

from llama_engine.measure.result import new_result, write_result
from llama_engine.measure.stats import bootstrap_ratio, summary
from llama_engine.measure.validity import judge

ENVIRONMENT = {
    "cpu": {"name": "A CPU", "cores": 2, "threads": 2, "memory_gb": 8.0, "l3_bytes": 1 << 20},
    "device": "cpu", "gpu": None, "command": "benchmarks/compare.py --runs 5",
    "software": {"torch": "2"}, "git": {"commit": "0" * 40, "dirty": False}, "fingerprint": "f" * 16,
    "read_bandwidth": {"device": "cpu", "bytes_per_s": 1e10, "buffer_bytes": 1, "method": "m"},
    "matmul": {"device": "cpu", "flop_per_s": 1e12, "method": "m"},
}  # fmt: skip
COST = {"weight_nbytes": 10**7, "kv_nbytes_per_token": 1000, "flop_per_token": 1e7}
WEIGHTS = "e" * 64


def measurement(benchmark, backend, seconds, **more):
    samples = {
        "ttft_ms": [30.0] * 5,
        "tpot_ms": [s * 100 for s in seconds],
        "latency_s": seconds,
        "output_tokens": [8] * 5,
    }
    summed = {key: summary(samples[key]) for key in ("ttft_ms", "tpot_ms", "latency_s")}
    summed |= {"itl_ms": summed["tpot_ms"], "output_tokens_per_s": summary([8 / s for s in seconds]), "mbu": 0.5,
               "mfu": 0.1, "step_nbytes": 1e7, "gpu_utilization_pct": None}  # fmt: skip
    model = {"name": "m", "source": more.pop("source", "pretrained"), "sha256": "a" * 64}
    workload = {"input_tokens": 4, "output_tokens": 8, "concurrency": 1, "warmup_runs": 1, "timed_runs": 5}
    return new_result(benchmark, backend, model=model, workload=workload, environment=ENVIRONMENT,
                      samples=samples, summary=summed, cost=COST, **more)  # fmt: skip


def write_folder(root):
    """A complete folder: baseline 1 s, engine 0.5 s, Triton at 1 and 2, accuracy passed."""
    engine = {"weights_sha256": WEIGHTS, "kernels": "k"}
    base = measurement("baseline", "transformers", [1.0] * 5)
    fast = measurement("optimized", "native", [0.5] * 5, engine=engine)
    both = measurement("comparison", "native", [1.0] * 5, engine=engine)
    both["samples"] = both["summary"] = {}
    both["speedup"] = {
        key: bootstrap_ratio([1.0] * 5, [0.5] * 5) for key in ("latency", "ttft", "tpot", "output_tokens_per_s")
    }
    triton = measurement("triton", "native", [0.6] * 5)
    triton["levels"] = [{"concurrency": n, "summary": triton["summary"]} for n in (1, 2)]
    triton["validity"] = judge(triton)
    gate = {"status": "PASSED", "reasons": []}
    figures = {"tokens": 20_000, "perplexity_baseline": 10.0, "perplexity_engine": 10.01, "perplexity_ratio": 1.001,
               "kl_mean": 0.001, "kl_max": 0.1, "top1_agreement": 0.99}  # fmt: skip
    accuracy = measurement("accuracy", "native", [1.0] * 5, engine=engine, gate=gate)
    accuracy["summary"] = figures
    condition = {"kind": "batch", "concurrency": 8, "compared": 64, "changed": 1, "share": 1 / 64,
                 "ci95": [0.003, 0.083], "output_tokens_per_s": 99.0}  # fmt: skip
    load = {"concurrency": 1, "invariant": "streaming"} | bootstrap_ratio([1.1] * 5, [1.0] * 5)
    company = measurement(
        "determinism", "native", [1.0] * 5,
        variants=[{"asked": "auto", "kernels": "k", "conditions": [condition]}],
        price={"status": "measured", "of": "auto", "loads": [load]},
    ) | {"samples": {}, "summary": {}, "workload": {"prompts": 64, "output_tokens": 8}}  # fmt: skip
    times = [{"s": i / 2 - 2, "tokens_per_s": 90.0 * (i != 4)} for i in range(20)]
    broken = {"answers": 40, "lost": 0, "duplicated": 0, "wrong": 0, "diverged": 1, "moved": 4,
              "resumed": 3, "killed_after_s": 2.0,
              "requests_without_one_right_answer": 0, "longest_gap_s": 0.4, "usual_gap_s": 0.1,
              "before_tokens_per_s": 90.0, "lowest_tokens_per_s": 0.0, "recovery_s": 1.5, "full_strength_s": 3.0,
              "timeline": times}  # fmt: skip
    scaling = [{"concurrency": 4, "one_tokens_per_s": 46.0, "all_tokens_per_s": 91.0, "ratio": 91 / 46}]
    died = measurement("failover", "native", [1.0] * 5, failover=broken, scaling=scaling)
    died["workload"] |= {"replicas": 2, "concurrency": 8}
    died["samples"] = {}
    for name, content in (("baseline", base), ("optimized-native", fast), ("comparison", both),
                          ("triton-native", triton), ("accuracy-native", accuracy),
                          ("determinism-native", company), ("failover", died)):  # fmt: skip
        write_result(root / f"{name}.json", content)
    return root
