"""Samples the GPU (NVML) or the CPU (psutil) from a thread while a section runs. What cannot be read is None."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any

import psutil
import torch

from llama_engine.measure.stats import bootstrap_ratio

SAMPLE_HZ = 25
SETTLE_S = 0.2  # NVML utilization looks back up to this long, so a section's first samples belong to the one before
_THROTTLE_BITS = {
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake": 0x80,
}  # nvml.h, nvmlClocksThrottleReason*


def nvml_handle() -> tuple[ModuleType | None, Any]:
    """(pynvml, the NVML handle of PyTorch's device 0), or (None, None) where there is none."""
    if not torch.cuda.is_available():
        return None, None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except Exception:  # no library, no permission, no such device: telemetry is optional, blanks say so
        return None, None


class Telemetry:
    """``with Telemetry("cuda") as telemetry: with telemetry.section("engine"): ...; telemetry.summary("engine")``."""

    def __init__(self, device: str = "cpu", *, hz: float = SAMPLE_HZ, own_processes: int = 1) -> None:
        self._period = 1 / hz
        self._own_processes = own_processes
        self._nvml, self._gpu = nvml_handle() if device.startswith("cuda") else (None, None)
        self._process = psutil.Process()
        self._samples: dict[str, list[dict[str, float | int | None]]] = {}
        self._energy_j: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._busy_s = 0.0
        self._active: tuple[str, float] | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def __enter__(self) -> Telemetry:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Samples taken until the block ends count for ``name``; a name may be entered many times."""
        psutil.cpu_percent()  # restarts the interval that the next reading covers
        self._process.cpu_percent()
        energy, start = self._read_energy(), time.perf_counter()
        self._active = (name, start)
        self._wake.set()
        try:
            yield
        finally:
            self._wake.clear()
            self._active = None
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            if energy is not None and (now := self._read_energy()) is not None:
                self._energy_j[name] = self._energy_j.get(name, 0.0) + now - energy

    def summary(self, name: str) -> dict[str, Any]:
        """Means and maxima of a section; GPU entries are None on a CPU-only machine."""
        samples = self._samples.get(name, [])

        def reduce(key: str) -> dict[str, float] | None:
            values = [sample[key] for sample in samples if sample.get(key) is not None]
            return {"mean": sum(values) / len(values), "max": max(values), "min": min(values)} if values else None

        reasons = [sample["throttle"] for sample in samples if sample.get("throttle") is not None]
        processes = [sample["processes"] for sample in samples if sample.get("processes") is not None]
        share = (
            {key: sum(bool(r & bit) for r in reasons) / len(reasons) for key, bit in _THROTTLE_BITS.items()}
            if reasons
            else None
        )
        seconds = self._seconds.get(name, 0.0)
        return {
            "samples": len(samples),
            "seconds": seconds,
            "sample_hz": len(samples) / seconds if seconds else None,
            "gpu_utilization_pct": reduce("utilization"),
            "gpu_power_w": reduce("power"),
            "gpu_memory_gb": reduce("memory"),
            "gpu_sm_clock_mhz": reduce("sm_clock"),
            "gpu_memory_clock_mhz": reduce("memory_clock"),
            "gpu_temperature_c": reduce("temperature"),
            "gpu_energy_j": self._energy_j.get(name),
            "throttle_share": share,
            "other_processes": max(0, max(processes) - self._own_processes) if processes and max(processes) else None,
            "cpu_utilization_pct": reduce("cpu"),
            "process_cpu_pct": reduce("process_cpu"),
            "process_memory_gb": reduce("rss"),
            "sampler_busy_share": self._busy_s / sum(self._seconds.values()) if seconds else None,
        }

    def _run(self) -> None:
        due = time.perf_counter()
        while not self._stop.is_set():
            if self._active is None:
                self._wake.wait()
                due = time.perf_counter()
                continue
            began = time.perf_counter()
            active = self._active
            if active is not None:
                sample = self._read(settled=began - active[1] > SETTLE_S)
                self._samples.setdefault(active[0], []).append(sample)
            self._busy_s += time.perf_counter() - began
            due = max(due + self._period, time.perf_counter())
            self._stop.wait(max(0.0, due - time.perf_counter()))

    def _read(self, *, settled: bool) -> dict[str, Any]:
        sample: dict[str, Any] = {
            "cpu": psutil.cpu_percent() if settled else None,
            "process_cpu": self._process.cpu_percent() if settled else None,
            "rss": self._process.memory_info().rss / 1e9,
        }
        nvml, gpu = self._nvml, self._gpu
        if nvml is None or gpu is None:
            return sample
        read = self._try
        if settled:
            sample["utilization"] = read(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        sample["power"] = read(lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3)
        sample["memory"] = read(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e9)
        sample["sm_clock"] = read(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM))
        sample["memory_clock"] = read(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM))
        sample["temperature"] = read(lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))
        sample["throttle"] = read(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))
        sample["processes"] = read(lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(gpu)))
        return sample

    def _read_energy(self) -> float | None:
        if self._nvml is None or self._gpu is None:
            return None
        return self._try(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) / 1e3)

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except self._nvml.NVMLError:
            return None


def measure_cost(device: str = "cpu", pairs: int = 15) -> dict[str, Any]:
    """Time of a fixed piece of work with the sampler / without it, interleaved, as a bootstrap ratio."""
    data = torch.randn(1024, 1024, device=device)

    def work() -> float:
        start = time.perf_counter()
        for _ in range(100 if device == "cpu" else 2000):
            data @ data
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    work()
    on, off = [], []
    with Telemetry(device) as telemetry:
        for _ in range(pairs):
            off.append(work())
            with telemetry.section("on"):
                on.append(work())
    return bootstrap_ratio(on, off) | {"sampler_busy_share": telemetry.summary("on")["sampler_busy_share"]}


if __name__ == "__main__":
    print(measure_cost("cuda" if torch.cuda.is_available() else "cpu"))
