import time

import pytest
import torch

from llama_engine.measure import environment, telemetry


def test_fingerprint_has_the_machine_and_is_stable():
    first, second = environment.fingerprint(), environment.fingerprint()
    assert first["fingerprint"] == second["fingerprint"]
    assert first["gpu"] is None
    assert first["cpu"]["cores"] >= 1
    assert first["software"]["torch"] == torch.__version__


def test_fingerprint_changes_with_the_thread_count():
    before, threads = environment.fingerprint()["fingerprint"], torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert environment.fingerprint()["fingerprint"] != before
    finally:
        torch.set_num_threads(threads)


def test_bandwidth_is_bytes_over_seconds(monkeypatch):
    monkeypatch.setattr(environment, "_fastest", lambda operation, device: 0.5)
    monkeypatch.setattr(environment, "_l3_bytes", lambda: 1 << 20)
    result = environment.measure_read_bandwidth("cpu")
    assert result["bytes_per_s"] == result["buffer_bytes"] / 0.5
    assert result["exceeds_l3"]


def test_command_hides_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{tmp_path}/benchmarks/x.py", "--output", f"{tmp_path}/results/a.json"])
    assert environment._command() == "benchmarks/x.py --output results/a.json"


class FakeNvml:
    """The calls of NVML that the sampler makes, with known answers."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, throttle=0, processes=1):
        self.energy, self.throttle, self.processes = 0, throttle, processes

    def __getattr__(self, name):
        answers = {
            "nvmlDeviceGetUtilizationRates": lambda h: type("U", (), {"gpu": 97})(),
            "nvmlDeviceGetPowerUsage": lambda h: 500_000,
            "nvmlDeviceGetMemoryInfo": lambda h: type("M", (), {"used": 9_000_000_000})(),
            "nvmlDeviceGetClockInfo": lambda h, kind: 1980,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda h: self.throttle,
            "nvmlDeviceGetComputeRunningProcesses": lambda h: [None] * self.processes,
            "nvmlDeviceGetTotalEnergyConsumption": self._count_energy,
        }
        if name not in answers:
            raise self.NVMLError(name)
        return answers[name]

    def _count_energy(self, handle):
        self.energy += 1000
        return self.energy


def record(monkeypatch, nvml, seconds=0.5):
    if nvml:
        monkeypatch.setattr(telemetry, "pynvml", nvml)
    monkeypatch.setattr(telemetry.Nvml, "__init__", lambda self: setattr(self, "_gpu", nvml))
    with telemetry.Telemetry("cuda") as sampler, sampler.section("a"):
        time.sleep(seconds)
    return sampler.summary("a")


def test_telemetry_reads_nvml(monkeypatch):
    nvml = FakeNvml(throttle=0x4, processes=3)
    result = record(monkeypatch, nvml)
    assert result["gpu_utilization_pct"] == {"mean": 97, "max": 97, "min": 97}
    assert result["gpu_power_w"]["mean"] == 500
    assert result["gpu_energy_j"] == pytest.approx(1.0)
    assert result["gpu_sm_clock_mhz"] == {"mean": 1980, "max": 1980, "min": 1980, "drift": 0}
    assert result["throttle_share"]["sw_power_cap"] == 1
    assert result["throttle_share"]["hw_slowdown"] == 0
    assert result["other_processes"] == 2
    assert result["gpu_temperature_c"] is None  # the fake refuses that call


def test_drift_is_between_times_that_a_section_was_entered(monkeypatch):
    nvml = FakeNvml()
    clock = 1980
    monkeypatch.setattr(nvml, "nvmlDeviceGetClockInfo", lambda *_: clock, raising=False)
    monkeypatch.setattr(telemetry, "pynvml", nvml)
    monkeypatch.setattr(telemetry.Nvml, "__init__", lambda self: setattr(self, "_gpu", nvml))
    with telemetry.Telemetry("cuda") as sampler:
        for turn in range(5):
            clock = 1980 if turn < 4 else 1000
            with sampler.section("a"):
                time.sleep(0.25)
    found = sampler.summary("a")["gpu_sm_clock_mhz"]
    assert found["drift"] * found["mean"] == pytest.approx(980)  # no quarter has samples of both


def test_telemetry_is_blank_without_a_gpu(monkeypatch):
    result = record(monkeypatch, None)
    assert result["gpu_power_w"] is None
    assert result["throttle_share"] is None
    assert result["process_memory_gb"]["mean"] > 0


def test_sections_are_separate():
    with telemetry.Telemetry() as sampler:
        with sampler.section("a"):
            time.sleep(0.15)
        time.sleep(0.1)
        with sampler.section("b"):
            time.sleep(0.01)
    assert sampler.summary("a")["samples"] > sampler.summary("b")["samples"]
    assert sampler.summary("c")["samples"] == 0
