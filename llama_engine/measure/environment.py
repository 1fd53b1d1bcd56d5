"""The machine a measurement was taken on, and the ceilings measured on it in the same run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import timeit
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from llama_engine.measure.telemetry import Nvml

LIBRARIES = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "triton",
    "tritonclient",
    "nvidia-pytriton",
    "tensorrt_llm",
)
CUDA_BUFFER_BYTES = 4 << 30
L3_MULTIPLE = 4  # a buffer this many times the last-level cache leaves at most a quarter of it to hit


def fingerprint(device: str = "cpu") -> dict[str, Any]:
    """CPU, GPU (None without one), software, git state, and a hash of what must match for a fair comparison."""
    cpu = {
        "name": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "l3_bytes": _l3_bytes(),
    }
    gpu = _gpu() if device == "cuda" else None
    software = {"python": platform.python_version(), "os": f"{platform.system()} {platform.release()}"}
    software |= {name: _version(name) for name in LIBRARIES}
    software["cuda"] = torch.version.cuda
    same = {"cpu": {key: cpu[key] for key in ("name", "cores", "threads")}, "gpu": None}
    if gpu:
        same["gpu"] = {key: gpu[key] for key in ("name", "count", "driver", "power_limit_w")}
    same["libraries"] = {name: software[name] for name in ("python", "torch", "transformers")}
    return {
        "device": device,
        "cpu": cpu,
        "gpu": gpu,
        "software": software,
        "git": _git(),
        "command": _command(),
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fingerprint": hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16],
        "fingerprint_of": same,
    }


def ceilings(device: str) -> dict[str, Any]:
    """``read_bandwidth`` and ``matmul``: the walls of this machine, measured now."""
    return {"read_bandwidth": measure_read_bandwidth(device), "matmul": measure_matmul_flops(device)}


def measure_read_bandwidth(device: str = "cpu") -> dict[str, Any]:
    """Peak read bandwidth in bytes/s: the fastest of several sums over an array far larger than any cache.

    CUDA: 4 GiB float32 timed with events. CPU: float32 over 4 times the last-level cache (256 MB to 4 GB, at most a
    quarter of free memory), all threads of PyTorch.
    """
    cuda, cache = device == "cuda", _l3_bytes()
    if cuda:
        size = min(CUDA_BUFFER_BYTES, torch.cuda.mem_get_info()[0] // 2)
    else:
        wanted = max(256 << 20, L3_MULTIPLE * (cache or 0))
        size = min(wanted, 4 << 30, psutil.virtual_memory().available // 4)
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = min(_fastest(operation, device) for operation in (data.sum, data.max))
    return {
        "device": device,
        "bytes_per_s": data.nbytes / best,
        "buffer_bytes": data.nbytes,
        "method": "fastest of sum and max over a float32 array, all threads",
        "threads": None if cuda else torch.get_num_threads(),
        "exceeds_l3": None if cuda or not cache else data.nbytes >= L3_MULTIPLE * cache,
    }


def measure_matmul_flops(device: str = "cpu") -> dict[str, Any]:
    """Peak dense matmul rate in FLOP/s, the 100 % of MFU: the fastest square product in the 16-bit type in use, or on a
    CPU in float32, which is the faster one where 16-bit instructions are missing."""
    found = []
    for dtype in (torch.float16,) if device == "cuda" else (torch.bfloat16, torch.float32):
        n = 8192 if device == "cuda" else 256
        while True:
            a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
            seconds = _fastest(lambda a=a, b=b: a @ b, device)
            if n >= 2048 or seconds > 0.05:  # without 16-bit instructions the largest would need minutes
                break
            n *= 2
        found.append((2 * n**3 / seconds, f"{n} x {n} {str(dtype)[6:]} product"))
    flops, method = max(found)
    return {"device": device, "flop_per_s": flops, "method": method}


def _fastest(operation: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of a dozen calls, or on a CPU of those that half a second has room for, at least three: by
    CUDA events on a GPU, by the wall clock on a CPU."""
    times: list[float] = []
    if device != "cuda":
        while len(times) < 3 or (len(times) < 12 and sum(times) < 0.5):
            times.append(timeit.timeit(operation, number=1))
        return min(times)
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        operation()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def _l3_bytes() -> int | None:
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:  # some virtual machines do not say
        return None
    return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]


def _gpu() -> dict[str, Any]:
    properties, nvml = torch.cuda.get_device_properties(0), Nvml()
    limit_mw, default_mw = (
        nvml.read(f"nvmlDeviceGet{name}") for name in ("EnforcedPowerLimit", "PowerManagementDefaultLimit")
    )
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": nvml.driver(),
        "power_limit_w": None if limit_mw is None else limit_mw / 1e3,
        "default_power_limit_w": None if default_mw is None else default_mw / 1e3,
        "max_sm_clock_mhz": nvml.read("nvmlDeviceGetMaxClockInfo", nvml.SM_CLOCK),
        "max_memory_clock_mhz": nvml.read("nvmlDeviceGetMaxClockInfo", nvml.MEMORY_CLOCK),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        root = Path(__file__).resolve().parents[2]
        try:
            return subprocess.check_output(
                ["git", "-C", root, *arguments], text=True, stderr=subprocess.DEVNULL
            ).strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("GIT_COMMIT"), "dirty": None}  # a copied tree has no history to ask
    # What a run has written does not change what the next one measures.
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no", ":!results"))}


def _command() -> str:
    """The command line, with paths under the working directory made relative."""
    return " ".join(sys.argv).replace(f"{os.getcwd()}/", "")
