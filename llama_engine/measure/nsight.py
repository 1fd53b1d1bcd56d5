"""Read Nsight Systems' SQLite exports into profile.json: launches, API time, busy share, gaps, kernels, phases.

    python -m llama_engine.measure.nsight --run INFO.json[:EXPORT.sqlite] --run ... --output results/local/profile.json

The tables are Nsight Systems' own (``nsys export --type sqlite``); times in them are nanoseconds.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_engine.errors import InputError, run_cli
from llama_engine.measure.result import Result, new_result, write_result

KERNELS, COPIES, RUNTIME, GRAPHS = (
    f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "RUNTIME", "GRAPH_TRACE")
)
MEMSETS = "CUPTI_ACTIVITY_KIND_MEMSET"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperative", "cuLaunchCooperative")
REPLAYS = ("cudaGraphLaunch", "cuGraphLaunch")
TRANSFERS = ("cudaMemcpy", "cuMemcpy", "cudaMemset", "cuMemset")

Call = tuple[int, int, str, int]  # start and end in ns, name, correlation id


def read_export(path: Path | str) -> dict[str, Any]:
    """Figures of one export: what its "decode" ranges submitted. Raises :class:`InputError` when there are none.

    ``launches`` is everything the CPU submits: kernels, graph replays, copies and memsets. ``kernels`` is what the
    GPU executed, also inside graphs when they were traced by node; ``graph_nodes_traced`` says whether they were.
    ``gpu_busy_share`` is the union of that work's device intervals over the time from its first start to its last
    end. ``tokens`` counts the decode steps that submitted something: an engine that runs ahead ends with one that only
    reads.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is missing: run scripts/profile_nsight.sh")
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return _read(database, path)
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} is not an Nsight Systems SQLite export: {error}") from None


def _read(database: sqlite3.Connection, path: Path | str) -> dict[str, Any]:
    tables = {row[0] for row in database.execute("select name from sqlite_master where type in ('table', 'view')")}
    if not {"NVTX_EVENTS", "StringIds"} <= tables:
        raise InputError(f"{path} holds no NVTX ranges: profile with --trace=cuda,nvtx")

    def rows(table: str, columns: str) -> list[tuple[Any, ...]]:
        return database.execute(f"select {columns} from {table} order by start").fetchall() if table in tables else []

    strings = dict(database.execute("select id, value from StringIds"))
    ranges: dict[str, list[tuple[int, int]]] = {}
    for start, end, text, text_id in rows("NVTX_EVENTS", "start, end, text, textId"):
        name = text or strings.get(text_id)
        if name and end is not None:
            ranges.setdefault(name, []).append((start, end))
    steps = ranges.get("decode")
    if not steps:
        raise InputError(f"{path}: no 'decode' range was recorded: profile benchmarks/*_nvtx.py")
    columns = "start, end, nameId, correlationId"
    calls = [(start, end, strings[name], link) for start, end, name, link in rows(RUNTIME, columns)]
    calls = [call for call in calls if call[2].startswith((*LAUNCHES, *REPLAYS, *TRANSFERS))]
    columns = "start, end, coalesce(shortName, demangledName), correlationId"
    kernels = [(start, end, strings[name], link) for start, end, name, link in rows(KERNELS, columns)]
    graphs = [(*row[:2], "CUDA graph", row[2]) for row in rows(GRAPHS, "start, end, correlationId")]
    copies = [
        (*row[:2], table, row[2]) for table in (COPIES, MEMSETS) for row in rows(table, "start, end, correlationId")
    ]
    inside = _within(calls, steps)
    links = {call[3] for call in inside}
    # An engine that runs ahead submits a step while the one before is on the device: correlation, not time, decides.
    device = [item for item in (*kernels, *graphs, *copies) if item[3] in links]
    executed = [kernel for kernel in kernels if kernel[3] in links]
    if not device:
        raise InputError(f"{path}: no decode step submitted GPU work: was it profiled on a GPU with --trace=cuda?")
    tokens = sum(bool(_within(inside, [step])) for step in steps)
    busy, gaps = _union([item[:2] for item in device])
    span = max(item[1] for item in device) - min(item[0] for item in device)
    count = {
        kind: sum(call[2].startswith(prefixes) for call in inside)
        for kind, prefixes in (("kernel", LAUNCHES), ("replay", REPLAYS), ("copy", TRANSFERS))
    }
    by_name: dict[str, list[int]] = {}
    for start, end, name, _ in executed:
        by_name.setdefault(name, []).append(end - start)
    total = sum(map(sum, by_name.values())) or 1
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:10]
    return {
        "tokens": tokens,
        "launches": len(inside),
        "launches_per_token": len(inside) / tokens,
        "kernel_launches_per_token": count["kernel"] / tokens,
        "copies_per_token": count["copy"] / tokens,
        "graph_replays": count["replay"],
        "graph_nodes_traced": bool(kernels) and not graphs,
        "kernels": len(executed),
        "kernels_per_token": len(executed) / tokens,
        "api_ms_per_token": sum(call[1] - call[0] for call in inside) / tokens / 1e6,
        "gpu_busy_share": busy / span,
        "gap_us_mean": float(np.mean(gaps)) / 1e3 if gaps else 0.0,
        "top_kernels": [
            {"name": name, "share": sum(times) / total, "calls": len(times), "mean_us": sum(times) / len(times) / 1e3}
            for name, times in top
        ],
        "phases": {name: _phase(spans, calls, [*kernels, *graphs]) for name, spans in sorted(ranges.items())},
    }


def _within(calls: Sequence[Call], spans: Sequence[tuple[int, int]]) -> list[Call]:
    """The calls that start inside one of the spans, which are sorted and do not overlap."""
    starts, ends = (np.array([span[i] for span in spans]) for i in (0, 1))
    places = np.searchsorted(starts, np.array([call[0] for call in calls], dtype=np.int64), side="right") - 1
    return [call for call, place in zip(calls, places) if place >= 0 and call[0] <= ends[place]]


def _union(intervals: Sequence[tuple[int, int]]) -> tuple[int, list[int]]:
    """(length of the union, gaps between its pieces) of intervals, in their unit."""
    busy, gaps, end = 0, [], None
    for start, stop in sorted(intervals):
        if end is None or start > end:
            if end is not None:
                gaps.append(start - end)
            busy += stop - start
            end = stop
        elif stop > end:
            busy += stop - end
            end = stop
    return busy, gaps


def _phase(spans: list[tuple[int, int]], calls: list[Call], work: list[Call]) -> dict[str, Any]:
    """A range name's totals: device time belongs to the phase whose API call submitted it (by correlation id)."""
    links = {call[3] for call in _within(calls, spans)}
    mine = [(start, end) for start, end, _, link in work if link in links]
    return {
        "ranges": len(spans),
        "wall_ms": sum(end - start for start, end in spans) / 1e6,
        "launches": len(links),
        "kernels": len(mine),
        "device_ms": sum(end - start for start, end in mine) / 1e6,
    }


def combine(runs: Sequence[str], profiler: str) -> Result:
    """One ``profile`` result of ``INFO.json[:EXPORT.sqlite]`` runs; without an export the info carries the profile."""
    stacks, infos = {}, []
    for entry in runs:
        info_path, _, export = entry.partition(":")
        try:
            info = json.loads(Path(info_path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{info_path} cannot be read: {error}") from None
        infos.append(info)
        stacks[info["stack"]] = read_export(export) if export else info["profile"]
    if len({info["model"]["sha256"] for info in infos}) > 1:
        raise InputError("the profiled runs are of different models: profile them again")
    last = infos[-1]
    backend = last["stack"] if last["stack"] in ("native", "tensorrt_llm") else "transformers"
    return new_result(
        "profile",
        backend,
        model=last["model"],
        workload=last["workload"],
        environment=last["environment"],
        engine=last["engine"],
        profiler=profiler,
        stacks=stacks,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="INFO[:EXPORT]")
    parser.add_argument("--profiler", default="Nsight Systems")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    result = combine(args.run, args.profiler)
    write_result(args.output, result, force=args.force)
    for name, profile in result["stacks"].items():
        per_token = profile["launches_per_token"]
        shown = (
            "no GPU"
            if per_token is None
            else f"{per_token:,.1f} launches a token, busy {profile['gpu_busy_share']:.1%}"
        )
        print(f"{name:<14} {shown}")


if __name__ == "__main__":
    run_cli(main)
