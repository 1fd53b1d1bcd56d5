"""Compare two result folders metric by metric, for somebody's CI.

Method: for every result file that both folders have, the raw samples of each metric (TTFT, TPOT, latency; of each
level too) enter an unpaired bootstrap of the ratio of medians; a metric regressed when its whole 95 % interval is
below 1 - --tolerance. Refused: INVALID results, other workloads or models, other fingerprints (unless --force, then
labelled).
Output: a table. Exit code 0 no regression, 3 regression, 4 not comparable.

    python scripts/compare_results.py results/old results/new
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llama_engine.errors import InputError, run_cli
from llama_engine.measure.result import Result, load_folder
from llama_engine.measure.stats import bootstrap_ratio

REGRESSION, NOT_COMPARABLE = 3, 4
METRICS = ("ttft_ms", "tpot_ms", "latency_s", "prefill_ttft_ms")  # times: lower is better
WORKLOAD = ("input_tokens", "output_tokens", "concurrency")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.02, help="loss that is not called a regression")
    parser.add_argument("--force", action="store_true", help="compare across fingerprints, and say so")
    args = parser.parse_args()
    if not 0 <= args.tolerance < 1:
        raise InputError(f"--tolerance must be in [0, 1), got {args.tolerance}")
    old, new = load_folder(args.old), load_folder(args.new)
    console = Console(width=110)
    obstacles = list(differences(old, new, args.force))
    if obstacles:
        for obstacle in obstacles:
            console.print(f"not comparable: {obstacle}")
        return NOT_COMPARABLE
    foreign = [name for name in shared(old, new) if fingerprint(old[name]) != fingerprint(new[name])]
    table = Table(title="DIFFERENT MACHINES OR VERSIONS (--force)" if foreign else None)
    for column in ("result", "metric", "new / old speed", "95 %", "verdict"):
        table.add_column(column)
    regressed = 0
    for name in shared(old, new):
        for metric, before, after in metrics(old[name], new[name]):
            ratio = bootstrap_ratio(before, after, paired=False)
            low, high = ratio["ci95"]
            bad = high < 1 - args.tolerance
            regressed += bad
            verdict = "REGRESSION" if bad else ratio["verdict"]
            table.add_row(name, metric, f"{ratio['ratio']:.3f}", f"{low:.3f} to {high:.3f}", verdict)
    console.print(table)
    console.print(f"{regressed} regressions" if regressed else "no regression")
    return REGRESSION if regressed else 0


def shared(old: dict[str, Result], new: dict[str, Result]) -> list[str]:
    return [name for name in old if name in new and old[name]["benchmark"] in ("baseline", "optimized", "triton")]


def fingerprint(result: Result) -> str:
    return result["environment"]["fingerprint"]


def differences(old: dict[str, Result], new: dict[str, Result], force: bool) -> Iterator[str]:
    """Why the two folders cannot be compared."""
    if not shared(old, new):
        yield "no measurement is in both folders"
    for name in shared(old, new):
        a, b = old[name], new[name]
        for which, result in (("old", a), ("new", b)):
            if result["validity"]["status"] != "VALID":
                yield f"{name}: the {which} result is INVALID: {'; '.join(result['validity']['reasons'])}"
        if a["model"]["sha256"] != b["model"]["sha256"]:
            yield f"{name}: other models ({a['model']['name']}, {b['model']['name']})"
        for key in WORKLOAD:
            if a["workload"].get(key) != b["workload"].get(key):
                yield f"{name}: {key} is {a['workload'].get(key)} and {b['workload'].get(key)}"
        if fingerprint(a) != fingerprint(b) and not force:
            yield f"{name}: other machine or library versions (--force compares them all the same, labelled)"


def metrics(old: Result, new: Result) -> Iterator[tuple[str, list[float], list[float]]]:
    """(metric, old samples, new samples) of a result and of the levels that both have."""
    for key in METRICS:
        if old["samples"].get(key) and new["samples"].get(key):
            yield key, old["samples"][key], new["samples"][key]
    after = {level.get("concurrency"): level for level in new.get("levels", [])}
    for level in old.get("levels", []):
        other = after.get(level.get("concurrency"))
        if level.get("concurrency") is None or other is None:
            continue
        for key in METRICS:
            pair = level.get("samples", {}).get(key), other.get("samples", {}).get(key)
            if pair[0] and pair[1]:
                yield f"{level['concurrency']} at once {key}", *pair


if __name__ == "__main__":
    run_cli(main)
