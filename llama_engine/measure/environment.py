"""The machine a measurement was taken on, and the ceilings measured on it in the same run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from llama_engine.measure.telemetry import nvml_handle

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
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "l3_bytes": _l3_bytes(),
    }
    gpu = _gpu() if device.startswith("cuda") else None
    software = {"python": platform.python_version(), "os": f"{platform.system()} {platform.release()}"}
    software |= {name: _version(name) for name in LIBRARIES}
    software["cuda"] = torch.version.cuda
    same = {"cpu": {key: cpu[key] for key in ("name", "cores", "threads")}, "gpu": None}
    if gpu:
        same["gpu"] = {key: gpu.get(key) for key in ("name", "count", "driver", "power_limit_w")}
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


def measure_read_bandwidth(device: str = "cpu", repeats: int = 0) -> dict[str, Any]:
    """Peak read bandwidth in bytes/s: the fastest of several sums over an array far larger than any cache.

    CUDA: 4 GiB float32 timed with events. CPU: float32 over 4 times the last-level cache (256 MB to 4 GB, at most a
    quarter of free memory), all threads of PyTorch.
    """
    if device.startswith("cuda"):
        size = min(CUDA_BUFFER_BYTES, torch.cuda.mem_get_info()[0] // 2)
        seconds = _cuda_seconds
    else:
        wanted = max(256 << 20, L3_MULTIPLE * (_l3_bytes() or 0))
        size = min(wanted, 4 << 30, psutil.virtual_memory().available // 4)
        seconds = _cpu_seconds
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = min(seconds(operation, repeats or 10) for operation in (data.sum, data.max))
    return {
        "device": device,
        "bytes_per_s": data.nbytes / best,
        "buffer_bytes": data.nbytes,
        "method": "fastest of sum and max over a float32 array, all threads",
        "threads": None if device.startswith("cuda") else torch.get_num_threads(),
        "exceeds_l3": None
        if device.startswith("cuda") or not _l3_bytes()
        else data.nbytes >= L3_MULTIPLE * _l3_bytes(),
    }


def measure_matmul_flops(device: str = "cpu", repeats: int = 0) -> dict[str, Any]:
    """Peak dense matmul rate in FLOP/s, the 100 % of MFU: the fastest square product in the 16-bit type in use."""
    cuda = device.startswith("cuda")
    n, dtype = (8192, torch.float16) if cuda else (2048, torch.bfloat16)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = (_cuda_seconds if cuda else _cpu_seconds)(lambda: a @ b, repeats or (10 if cuda else 5))
    return {"device": device, "flop_per_s": 2 * n**3 / best, "method": f"{n} x {n} {str(dtype)[6:]} product"}


def _cpu_seconds(operation: Callable[[], object], repeats: int) -> float:
    operation()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        operation()
        best = min(best, time.perf_counter() - start)
    return best


def _cuda_seconds(operation: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        operation()
    best = float("inf")
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        operation()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _l3_bytes() -> int | None:
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
    except (OSError, KeyError, ValueError):
        return None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    info: dict[str, Any] = {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }
    nvml, handle = nvml_handle()
    if handle is None:
        return info | {"driver": None, "power_limit_w": None, "max_sm_clock_mhz": None, "max_memory_clock_mhz": None}

    def read(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except nvml.NVMLError:
            return None

    limit = read(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    driver = read(nvml.nvmlSystemGetDriverVersion)
    return info | {
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "power_limit_w": None if limit is None else limit / 1e3,
        "max_sm_clock_mhz": read(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "max_memory_clock_mhz": read(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)),
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
            out = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return out.stdout.strip() if out.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("GIT_COMMIT"), "dirty": None}  # a copied tree has no history to ask
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _command() -> str:
    """The command line, with paths under the working directory made relative."""
    here = f"{os.getcwd()}/"
    return " ".join(argument.replace(here, "") for argument in sys.argv)
