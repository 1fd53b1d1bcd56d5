"""Figures of a hand-made export, then of exports recorded by nsys on an H100."""

import gzip
import json
import sqlite3
from pathlib import Path

import pytest

from llama_engine.errors import InputError
from llama_engine.measure import nsight


@pytest.fixture
def export(tmp_path):
    """Two decode steps, 0-100 and 100-200 us: in each one kernel launch, one graph replay of two nodes, one copy."""
    path = tmp_path / "a.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("create table StringIds (id int, value text)")
        names = ["cudaLaunchKernel_v7000", "cudaGraphLaunch_v10000", "cudaMemcpyAsync_v3020",
                 "cudaStreamSynchronize_v3020", "gemv", "attention", "decode"]  # fmt: skip
        db.executemany("insert into StringIds values (?, ?)", enumerate(names))
        db.execute("create table NVTX_EVENTS (start int, end int, text text, textId int)")
        db.execute("create table CUPTI_ACTIVITY_KIND_RUNTIME (start int, end int, nameId int, correlationId int)")
        db.execute(
            "create table CUPTI_ACTIVITY_KIND_KERNEL (start int, end int, shortName int, demangledName int,"
            " correlationId int)"
        )
        db.execute("create table CUPTI_ACTIVITY_KIND_MEMCPY (start int, end int, correlationId int)")
        db.execute("insert into NVTX_EVENTS values (-500000, -100000, 'warm-up', null)")
        for step in (0, 1):
            t, link = step * 100_000, 10 * step
            db.execute("insert into NVTX_EVENTS values (?, ?, null, 6)", (t, t + 100_000))
            calls = [(0, 5_000, 0, 1), (6_000, 9_000, 1, 2), (10_000, 12_000, 2, 3), (13_000, 90_000, 3, 4)]
            db.executemany(
                "insert into CUPTI_ACTIVITY_KIND_RUNTIME values (?, ?, ?, ?)",
                [(t + a, t + b, name, link + number) for a, b, name, number in calls],
            )
            kernels = [(10_000, 30_000, 4, 1), (40_000, 60_000, 5, 2), (50_000, 70_000, 4, 2)]
            db.executemany(
                "insert into CUPTI_ACTIVITY_KIND_KERNEL values (?, ?, ?, ?, ?)",
                [(t + a, t + b, name, name, link + number) for a, b, name, number in kernels],
            )
            db.execute("insert into CUPTI_ACTIVITY_KIND_MEMCPY values (?, ?, ?)", (t + 80_000, t + 90_000, link + 3))
    return path


def test_figures_by_hand(export):
    result = nsight.read_export(export)
    assert result["tokens"] == 2
    assert result["launches_per_token"] == 3  # synchronizing is not a launch
    assert (result["kernel_launches_per_token"], result["copies_per_token"], result["graph_replays"]) == (1, 1, 2)
    assert result["kernels_per_token"] == 3
    assert result["graph_nodes_traced"]
    assert result["api_ms_per_token"] == pytest.approx(0.010)
    assert result["gpu_busy_share"] == pytest.approx(120 / 180)  # 20 + 30 + 10 of every 100 us, from 10 to 190
    assert result["gap_us_mean"] == pytest.approx((10 + 10 + 20 + 10 + 10) / 5)
    assert result["top_kernels"][0] == {"name": "gemv", "share": pytest.approx(2 / 3), "calls": 4, "mean_us": 20.0}
    decode = result["phases"]["decode"]
    assert (decode["ranges"], decode["launches"], decode["kernels"]) == (2, 6, 6)
    assert decode["device_ms"] == pytest.approx(0.12)
    assert result["phases"]["warm-up"]["launches"] == 0


def test_untraced_graphs_are_said_to_be_so(export):
    with sqlite3.connect(export) as db:
        db.execute("create table CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start int, end int, correlationId int)")
        db.execute("insert into CUPTI_ACTIVITY_KIND_GRAPH_TRACE values (90000, 95000, 2)")
    result = nsight.read_export(export)
    assert not result["graph_nodes_traced"]
    assert result["gpu_busy_share"] == pytest.approx((120 + 5) / 180)


def test_work_belongs_to_the_step_that_submitted_it(export):
    """An engine that runs ahead: the prefill's kernel executes while a decode step is being submitted."""
    with sqlite3.connect(export) as db:
        db.execute("insert into NVTX_EVENTS values (-90000, -10000, 'prefill', null)")
        db.execute("insert into CUPTI_ACTIVITY_KIND_RUNTIME values (-80000, -79000, 0, 99)")
        db.execute("insert into CUPTI_ACTIVITY_KIND_KERNEL values (1000, 9000, 4, 4, 99)")
        db.execute("insert into NVTX_EVENTS values (200000, 210000, 'decode', null)")  # reads, submits nothing
    result = nsight.read_export(export)
    assert (result["tokens"], result["kernels_per_token"]) == (2, 3)
    assert result["phases"]["prefill"]["device_ms"] == pytest.approx(0.008)


def test_recorded_export(tmp_path):
    """Llama 3.2 1B geometry, transformers on an H100, nsys 2025.3.1: three forward passes of 679 kernels."""
    path = tmp_path / "h100.sqlite"
    dump = Path(__file__).parents[1] / "golden" / "nsight_h100_baseline.sql.gz"
    with sqlite3.connect(path) as db:
        db.executescript(gzip.decompress(dump.read_bytes()).decode())
    result = nsight.read_export(path)
    assert result["tokens"] == 3
    assert result["graph_replays"] == 0
    assert result["kernels_per_token"] == result["kernel_launches_per_token"] == 679
    assert 0.05 < result["gpu_busy_share"] < 0.15
    phases = result["phases"]
    assert phases["attention"]["ranges"] == phases["mlp"]["ranges"] == 16 * 4  # layers x (prefill + 3 steps)
    assert phases["norm"]["ranges"] == 2 * phases["mlp"]["ranges"]
    assert phases["mlp"]["device_ms"] > phases["norm"]["device_ms"]
    assert result["top_kernels"][0]["share"] < 0.5


@pytest.mark.parametrize(("sql", "message"), [
    ("delete from CUPTI_ACTIVITY_KIND_RUNTIME", "no decode step submitted"),
    ("delete from NVTX_EVENTS", "no 'decode' range"),
    ("drop table NVTX_EVENTS", "no NVTX ranges"),
])  # fmt: skip
def test_unusable_exports(export, sql, message):
    with sqlite3.connect(export) as db:
        db.execute(sql)
    with pytest.raises(InputError, match=message):
        nsight.read_export(export)


def test_not_an_export(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        nsight.read_export(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("hello " * 300)
    with pytest.raises(InputError, match="not an Nsight"):
        nsight.read_export(tmp_path / "text.sqlite")


def test_combine_refuses_two_models(export, tmp_path):
    entries = []
    for index, name in enumerate(("transformers", "native")):
        info = {
            "stack": name, "model": {"name": "m", "source": "pretrained", "sha256": str(index) * 64}, "workload": {},
            "environment": {"cpu": {}, "gpu": None, "software": {}, "git": {}, "fingerprint": "f"}, "engine": None,
        }  # fmt: skip
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(info))
        entries.append(f"{path}:{export}")
    with pytest.raises(InputError, match="different models"):
        nsight.combine(entries, "Nsight Systems")
    with pytest.raises(InputError, match="holds no profile"):
        nsight.combine([entries[1].partition(":")[0]], "Nsight Systems")
    with pytest.raises(InputError, match=r"baseline\.json lacks a value .*'stack'"):
        nsight.combine(["results/cpu/baseline.json"], "Nsight Systems")
    result = nsight.combine(entries[1:], "Nsight Systems 2025.3")
    assert result["stacks"]["native"]["launches_per_token"] == 3
    assert result["validity"]["status"] == "VALID"
