"""Read Nsight Systems' SQLite exports into profile.json: launches, API time, busy share, gaps, kernels, phases.

    python -m llama_engine.measure.nsight --run INFO.json[:EXPORT.sqlite] --run ... --output results/local/profile.json

The tables are Nsight Systems' own (``nsys export --type sqlite``); times in them are nanoseconds.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_engine.errors import InputError, run_cli
from llama_engine.files import checked, read_json
from llama_engine.flags import Parser
from llama_engine.measure.result import Result, new_result, write_result

SUBMITS = re.compile(r"cu(?:da)?(LaunchKernel|LaunchCooperative|GraphLaunch|Memcpy|Memset)")
Event = tuple[int, int, str, int]  # start and end in ns, name, correlation id


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
    strings = dict(database.execute("select id, value from StringIds"))

    def events(kind: str, name: str = "null") -> list[Event]:
        table = f"CUPTI_ACTIVITY_KIND_{kind}"
        query = f"select start, end, {name}, correlationId from {table} order by start"
        found = database.execute(query) if table in tables else ()
        return [(start, end, strings.get(text, kind), link) for start, end, text, link in found]

    ranges: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    query = "select start, end, text, textId from NVTX_EVENTS where end is not null order by start"
    for start, end, text, text_id in database.execute(query):
        ranges[text or strings.get(text_id, "")].append((start, end))
    if "decode" not in ranges:
        raise InputError(f"{path}: no 'decode' range was recorded: profile benchmarks/*_nvtx.py")
    calls = [call for call in events("RUNTIME", "nameId") if SUBMITS.match(call[2])]
    kernels, graphs = events("KERNEL", "coalesce(shortName, demangledName)"), events("GRAPH_TRACE")
    inside = _within(calls, ranges["decode"])
    links = {call[3] for call in inside}
    # An engine that runs ahead submits a step while the one before is on the device: correlation, not time, decides.
    device = [x for x in (*kernels, *graphs, *events("MEMCPY"), *events("MEMSET")) if x[3] in links]
    if not device:
        raise InputError(f"{path}: no decode step submitted GPU work: was it profiled on a GPU with --trace=cuda?")
    tokens = sum(bool(_within(inside, [step])) for step in ranges["decode"])
    span, gaps = _gaps(device)
    count = Counter(SUBMITS.match(call[2])[1] for call in inside)
    times: defaultdict[str, list[int]] = defaultdict(list)
    for start, end, name, link in kernels:
        if link in links:
            times[name].append(end - start)
    executed, total = sum(map(len, times.values())), sum(map(sum, times.values()))
    return {
        "tokens": tokens,
        "launches": len(inside),
        "launches_per_token": len(inside) / tokens,
        "kernel_launches_per_token": (count["LaunchKernel"] + count["LaunchCooperative"]) / tokens,
        "copies_per_token": (count["Memcpy"] + count["Memset"]) / tokens,
        "graph_replays": count["GraphLaunch"],
        "graph_nodes_traced": bool(kernels) and not graphs,
        "kernels": executed,
        "kernels_per_token": executed / tokens,
        "api_ms_per_token": sum(call[1] - call[0] for call in inside) / tokens / 1e6,
        "gpu_busy_share": 1 - sum(gaps) / span,
        "gap_us_mean": sum(gaps) / len(gaps) / 1e3 if gaps else 0.0,
        "top_kernels": [
            {"name": name, "share": sum(ns) / total, "calls": len(ns), "mean_us": sum(ns) / len(ns) / 1e3}
            for name, ns in sorted(times.items(), key=lambda item: -sum(item[1]))[:10]
        ],
        "phases": {name: _phase(spans, calls, [*kernels, *graphs]) for name, spans in sorted(ranges.items()) if name},
    }


def _within(calls: Sequence[Event], spans: Sequence[tuple[int, int]]) -> list[Event]:
    """The calls that start inside one of the spans, which are sorted and do not overlap."""
    places = np.searchsorted([span[0] for span in spans], [call[0] for call in calls], side="right") - 1
    return [call for call, place in zip(calls, places) if place >= 0 and call[0] <= spans[place][1]]


def _gaps(events: Sequence[Event]) -> tuple[int, list[int]]:
    """(first start to last end, times in it that no event covers) in ns."""
    starts, ends = np.array(sorted(event[:2] for event in events)).T
    ends = np.maximum.accumulate(ends)
    gaps = starts[1:] - ends[:-1]
    return int(ends[-1] - starts[0]), gaps[gaps > 0].tolist()


def _phase(spans: list[tuple[int, int]], calls: list[Event], work: list[Event]) -> dict[str, Any]:
    """A range name's totals: device time belongs to the phase whose API call submitted it (by correlation id)."""
    links = {call[3] for call in _within(calls, spans)}
    mine = [end - start for start, end, _, link in work if link in links]
    return {
        "ranges": len(spans),
        "wall_ms": sum(end - start for start, end in spans) / 1e6,
        "launches": len(links),
        "kernels": len(mine),
        "device_ms": sum(mine) / 1e6,
    }


def combine(runs: Sequence[str], profiler: str) -> Result:
    """One ``profile`` result of ``INFO.json[:EXPORT.sqlite]`` runs; without an export the info carries the profile."""
    stacks, models = {}, set()
    for entry in runs:
        info_path, _, export = entry.partition(":")
        info = read_json(Path(info_path))
        with checked(Path(info_path)):
            stack, profile, model = info["stack"], info.get("profile"), info["model"]["sha256"]
            about = {key: info[key] for key in ("model", "workload", "environment", "engine")}
        if not export and not profile:
            raise InputError(f"{info_path} holds no profile: give its export too, {info_path}:EXPORT.sqlite")
        models.add(model)
        stacks[stack] = read_export(export) if export else profile
    if len(models) > 1:
        raise InputError("the profiled runs are of different models: profile them again")
    return new_result("profile", stack, **about, profiler=profiler, stacks=stacks)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", action="append", required=True, metavar="INFO[:EXPORT]")
    parser.add_argument("--profiler", default="Nsight Systems")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    result = combine(args.run, args.profiler)
    write_result(args.output, result, force=args.force)
    for name, profile in result["stacks"].items():
        launches, busy = profile["launches_per_token"], profile["gpu_busy_share"]
        print(name, "no GPU" if launches is None else f"{launches:,.1f} launches a token, busy {busy:.1%}")


if __name__ == "__main__":
    run_cli(main)
