"""Compare two result folders metric by metric, for somebody's CI.

Method: for every result file that both folders have, the raw samples of each metric (TTFT, TPOT, latency; of each
level too) enter an unpaired bootstrap of the ratio of medians; a metric regressed when its whole 95 % interval is
below 1 - --tolerance. Refused: INVALID results, other workloads or models, other fingerprints (unless --force, then
labelled). A level that is INVALID or has another workload is left out, and named.
Output: a table. Exit code 0 no regression, 3 regression, 4 not comparable.

    python scripts/compare_results.py results/old results/new
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure.compare import compare
from llama_engine.measure.result import load_folder

REGRESSION, NOT_COMPARABLE = 3, 4


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.02, help="loss that is not called a regression")
    parser.add_argument("--force", action="store_true", help="compare across fingerprints, and say so")
    args = parser.parse_args()
    if not 0 <= args.tolerance < 1:
        raise InputError(f"--tolerance must be in [0, 1), got {args.tolerance}")
    found = compare(load_folder(args.old), load_folder(args.new), args.tolerance, args.force)
    console = Console(width=110)
    for load in found.left_out:
        console.print(f"left out: {load}", markup=False)
    for obstacle in found.obstacles:
        console.print(f"not comparable: {obstacle}", markup=False)
    if found.obstacles:
        return NOT_COMPARABLE
    title = "DIFFERENT MACHINES OR VERSIONS (--force)" if found.foreign else None
    table = Table("result", "metric", "new / old speed", "95 %", "verdict", title=title)
    for row in found.rows:
        low, high = row.ratio["ci95"]
        verdict = "REGRESSION" if row.regressed else row.ratio["verdict"]
        table.add_row(row.result, row.metric, f"{row.ratio['ratio']:.3f}", f"{low:.3f} to {high:.3f}", verdict)
    console.print(table)
    console.print(f"{found.regressions} regressions" if found.regressions else "no regression")
    return REGRESSION if found.regressions else 0


if __name__ == "__main__":
    run_cli(main)
