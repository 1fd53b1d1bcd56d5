"""Samples the GPU (NVML) or the CPU (psutil) from a thread while a section runs. What cannot be read is None."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pynvml
import torch

from llama_engine.measure.stats import drift

SAMPLE_HZ = 25
SETTLE_S = 0.2  # NVML utilization looks back up to this long, so a section's first samples belong to the one before
THROTTLE_BITS = {
    "sw_power_cap": pynvml.nvmlClocksThrottleReasonSwPowerCap,
    "hw_slowdown": pynvml.nvmlClocksThrottleReasonHwSlowdown,
    "sw_thermal_slowdown": pynvml.nvmlClocksThrottleReasonSwThermalSlowdown,
    "hw_thermal_slowdown": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
    "hw_power_brake": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
}


class Nvml:
    """NVML on PyTorch's device 0; every reading is None where there is no GPU, library or permission."""

    SM_CLOCK, MEMORY_CLOCK = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM

    def __init__(self) -> None:
        self._gpu = None
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(0).uuid)
            self._gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        except (pynvml.NVMLError, RuntimeError, AssertionError):  # the last two: PyTorch without a GPU
            pass

    def read(self, call: str, *arguments: int) -> Any:
        """``pynvml.<call>(gpu, *arguments)``, or None."""
        try:
            return getattr(pynvml, call)(self._gpu, *arguments) if self._gpu else None
        except pynvml.NVMLError:
            return None

    def driver(self) -> str | None:
        return pynvml.nvmlSystemGetDriverVersion() if self._gpu else None


class Telemetry:
    """``with Telemetry("cuda") as telemetry: with telemetry.section("engine"): ...; telemetry.summary("engine")``."""

    def __init__(self, device: str = "cpu", *, own_processes: int = 1) -> None:
        self._own_processes = own_processes
        self._nvml = Nvml() if device == "cuda" else None
        self._process = psutil.Process()
        self._samples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._energy_j: defaultdict[str, float] = defaultdict(float)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._busy_s = 0.0
        self._active: tuple[str, float] | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def __enter__(self) -> Telemetry:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Samples taken until the block ends count for ``name``; a name may be entered many times."""
        psutil.cpu_percent()  # restarts the interval that the next reading covers
        self._process.cpu_percent()
        energy_mj, start = self._read_energy(), time.perf_counter()
        self._active = (name, start)
        self._wake.set()
        try:
            yield
        finally:
            self._wake.clear()
            self._active = None
            self._seconds[name] += time.perf_counter() - start
            if energy_mj is not None and (now_mj := self._read_energy()) is not None:
                self._energy_j[name] += (now_mj - energy_mj) / 1e3

    def summary(self, name: str) -> dict[str, Any]:
        """Means and maxima of a section; GPU entries are None on a CPU-only machine."""
        samples, seconds = self._samples.get(name, []), self._seconds.get(name, 0.0)

        def values(key: str) -> list[Any]:
            return [sample[key] for sample in samples if sample.get(key) is not None]

        def reduce(key: str) -> dict[str, float] | None:
            found = values(key)
            return {"mean": sum(found) / len(found), "max": max(found), "min": min(found)} if found else None

        if clock := reduce("sm_clock"):
            turns: defaultdict[float, list[float]] = defaultdict(list)
            for sample in samples:
                if sample.get("sm_clock") is not None:
                    turns[sample["entered"]].append(sample["sm_clock"])
            clock["drift"] = drift(list(turns.values()))
        reasons, processes = values("throttle"), max(values("processes"), default=0)
        return {
            "samples": len(samples),
            "seconds": seconds,
            "sample_hz": len(samples) / seconds if seconds else None,
            "gpu_utilization_pct": reduce("utilization"),
            "gpu_power_w": reduce("power"),
            "gpu_memory_gb": reduce("memory"),
            "gpu_sm_clock_mhz": clock,
            "gpu_memory_clock_mhz": reduce("memory_clock"),
            "gpu_temperature_c": reduce("temperature"),
            "gpu_energy_j": self._energy_j.get(name),
            "throttle_share": {
                key: sum(bool(reason & bit) for reason in reasons) / len(reasons) for key, bit in THROTTLE_BITS.items()
            }
            if reasons
            else None,
            "other_processes": max(0, processes - self._own_processes) if processes else None,
            "cpu_utilization_pct": reduce("cpu"),
            "process_cpu_pct": reduce("process_cpu"),
            "process_memory_gb": reduce("rss"),
            "sampler_busy_share": self._busy_s / sum(self._seconds.values()) if seconds else None,
        }

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            began = time.perf_counter()
            if active := self._active:
                name, entered = active
                self._samples[name].append(self._read(settled=began - entered > SETTLE_S) | {"entered": entered})
            spent = time.perf_counter() - began
            self._busy_s += spent
            self._stop.wait(max(0.0, 1 / SAMPLE_HZ - spent))

    def _read(self, *, settled: bool) -> dict[str, Any]:
        sample: dict[str, Any] = {"rss": self._process.memory_info().rss / 1e9}
        if settled:
            sample |= {"cpu": psutil.cpu_percent(), "process_cpu": self._process.cpu_percent()}
        if nvml := self._nvml:
            power_mw, memory = nvml.read("nvmlDeviceGetPowerUsage"), nvml.read("nvmlDeviceGetMemoryInfo")
            processes = nvml.read("nvmlDeviceGetComputeRunningProcesses")
            busy = nvml.read("nvmlDeviceGetUtilizationRates") if settled else None
            sample |= {
                "utilization": busy and busy.gpu,
                "power": power_mw and power_mw / 1e3,
                "memory": memory and memory.used / 1e9,
                "sm_clock": nvml.read("nvmlDeviceGetClockInfo", nvml.SM_CLOCK),
                "memory_clock": nvml.read("nvmlDeviceGetClockInfo", nvml.MEMORY_CLOCK),
                "temperature": nvml.read("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
                "throttle": nvml.read("nvmlDeviceGetCurrentClocksThrottleReasons"),
                "processes": None if processes is None else len(processes),
            }
        return sample

    def _read_energy(self) -> int | None:
        return self._nvml.read("nvmlDeviceGetTotalEnergyConsumption") if self._nvml else None
