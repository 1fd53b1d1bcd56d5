"""Compare two result folders metric by metric, for somebody's CI.

Method: for every result file that both folders have, the raw samples of each metric (TTFT, TPOT, latency; of each
level too) enter an unpaired bootstrap of the ratio of medians; a metric regressed when its whole 95 % interval is
below 1 - --tolerance. Refused: INVALID results, other workloads or models, other fingerprints (unless --force, then
labelled). A level that is INVALID or has another workload is left out, and named.
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
from llama_engine.measure.result import MEASUREMENTS, Result, dig, load_folder
from llama_engine.measure.stats import bootstrap_ratio

REGRESSION, NOT_COMPARABLE = 3, 4
METRICS = ("ttft_ms", "tpot_ms", "latency_s", "prefill_ttft_ms")  # times: lower is better
WORKLOAD = ("input_tokens", "output_tokens", "input_tokens_range", "output_tokens_range", "concurrency")
WORKLOAD += ("streaming", "protocol")
SAME = ("model.sha256", "summary.prefill_ttft_ms.input_tokens", *(f"workload.{name}" for name in WORKLOAD))
FINGERPRINT = "environment.fingerprint"


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
    pairs = {name: (old[name], new[name]) for name in old if name in new and old[name]["benchmark"] in MEASUREMENTS}
    console = Console(width=110)
    if obstacles := list(differences(pairs, args.force)):
        for obstacle in obstacles:
            console.print(f"not comparable: {obstacle}")
        return NOT_COMPARABLE
    foreign = any(dig(a, FINGERPRINT) != dig(b, FINGERPRINT) for a, b in pairs.values())
    title = "DIFFERENT MACHINES OR VERSIONS (--force)" if foreign else None
    table = Table("result", "metric", "new / old speed", "95 %", "verdict", title=title)
    regressed = 0
    for name, pair in pairs.items():
        for load, before, after in loads(*pair):
            if obstacles := list(unlike(before, after)):
                console.print(f"left out: {name}, {load.strip()}: {'; '.join(obstacles)}")
                continue
            for metric in METRICS:
                samples = dig(before, f"samples.{metric}"), dig(after, f"samples.{metric}")
                if not all(samples):
                    continue
                ratio = bootstrap_ratio(*samples, paired=False)
                low, high = ratio["ci95"]
                bad = high < 1 - args.tolerance
                regressed += bad
                verdict = "REGRESSION" if bad else ratio["verdict"]
                table.add_row(name, load + metric, f"{ratio['ratio']:.3f}", f"{low:.3f} to {high:.3f}", verdict)
    if not table.rows:
        console.print("not comparable: no load is in both folders")
        return NOT_COMPARABLE
    console.print(table)
    console.print(f"{regressed} regressions" if regressed else "no regression")
    return REGRESSION if regressed else 0


def differences(pairs: dict[str, tuple[Result, Result]], force: bool) -> Iterator[str]:
    """Why the two folders cannot be compared."""
    if not pairs:
        yield "no measurement is in both folders"
    for name, (old, new) in pairs.items():
        for obstacle in unlike(old, new):
            yield f"{name}: {obstacle}"
        if dig(old, FINGERPRINT) != dig(new, FINGERPRINT) and not force:
            yield f"{name}: other machine or library versions (--force compares them all the same, labelled)"


def unlike(old: Result, new: Result) -> Iterator[str]:
    """Why two results, or a level of each, cannot be compared."""
    for which, part in (("old", old), ("new", new)):
        if dig(part, "validity.status") == "INVALID":
            yield f"the {which} one is INVALID: {'; '.join(part['validity']['reasons'])}"
    for path in SAME:
        if dig(old, path) != dig(new, path):
            yield f"{path} is {dig(old, path)} and {dig(new, path)}"


def loads(old: Result, new: Result) -> Iterator[tuple[str, Result, Result]]:
    """A result itself, named "", and the closed-loop levels that both have, such as "8 at once "."""
    before, after = (
        {"": x} | {f"{y['concurrency']} at once ": y for y in x.get("levels", []) if "concurrency" in y}
        for x in (old, new)
    )
    yield from ((name, before[name], after[name]) for name in before if name in after)


if __name__ == "__main__":
    run_cli(main)
