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
from llama_engine.measure.story import MEASUREMENTS, dig

REGRESSION, NOT_COMPARABLE = 3, 4
METRICS = ("ttft_ms", "tpot_ms", "latency_s", "prefill_ttft_ms")  # times: lower is better
SAME = ("model.sha256", "workload.input_tokens", "workload.output_tokens", "workload.concurrency")
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
        for metric, before, after in metrics(*pair):
            ratio = bootstrap_ratio(before, after, paired=False)
            low, high = ratio["ci95"]
            bad = high < 1 - args.tolerance
            regressed += bad
            verdict = "REGRESSION" if bad else ratio["verdict"]
            table.add_row(name, metric, f"{ratio['ratio']:.3f}", f"{low:.3f} to {high:.3f}", verdict)
    console.print(table)
    console.print(f"{regressed} regressions" if regressed else "no regression")
    return REGRESSION if regressed else 0


def differences(pairs: dict[str, tuple[Result, Result]], force: bool) -> Iterator[str]:
    """Why the two folders cannot be compared."""
    if not pairs:
        yield "no measurement is in both folders"
    for name, (old, new) in pairs.items():
        for which, result in (("old", old), ("new", new)):
            if result["validity"]["status"] != "VALID":
                yield f"{name}: the {which} result is INVALID: {'; '.join(result['validity']['reasons'])}"
        for path in SAME:
            if dig(old, path) != dig(new, path):
                yield f"{name}: {path} is {dig(old, path)} and {dig(new, path)}"
        if dig(old, FINGERPRINT) != dig(new, FINGERPRINT) and not force:
            yield f"{name}: other machine or library versions (--force compares them all the same, labelled)"


def metrics(old: Result, new: Result) -> Iterator[tuple[str, list[float], list[float]]]:
    """(metric, old samples, new samples) of a result and of the closed-loop levels that both have."""
    before, after = (
        {"": x} | {f"{y['concurrency']} at once ": y for y in x.get("levels", []) if "concurrency" in y}
        for x in (old, new)
    )
    for prefix in (name for name in before if name in after):
        for key in METRICS:
            samples = dig(before, f"{prefix}.samples.{key}"), dig(after, f"{prefix}.samples.{key}")
            if all(samples):
                yield prefix + key, *samples


if __name__ == "__main__":
    run_cli(main)
