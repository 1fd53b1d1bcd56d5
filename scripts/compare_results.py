"""Judge one set of results, or compare two metric by metric, for somebody's CI: ours, or those of other tools.

A folder is one of ours, or of an aiperf run; a file a result of ours, a report of guidellm, or what vllm bench serve
wrote with --save-result --save-detailed. Another tool's records are computed again by docs/METRICS.md and judged by
our rules; it is said which rules lack fields, and what the tool itself calls a figure of another formula.
Method: for every result that both sides have, the raw samples of each metric (TTFT, TPOT, latency; of each level too)
enter an unpaired bootstrap of the ratio of medians; a metric regressed when its whole 95 % interval is below
1 - --tolerance. Refused: INVALID results, other workloads or models, other fingerprints (unless --force, then
labelled). A level that is INVALID or has another workload is left out, and named.
Output: a table. Exit code 0 no regression, 3 regression, 4 not comparable; with one set 0 VALID, 1 INVALID.

    python scripts/compare_results.py results/old results/new
    python scripts/compare_results.py guidellm.json
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure import others
from llama_engine.measure.compare import compare
from llama_engine.measure.result import Result, load_folder, load_result
from llama_engine.report.show import show, show_foreign

REGRESSION, NOT_COMPARABLE = 3, 4


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("old", type=Path, help="a folder or file; alone it is judged")
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--tolerance", type=float, default=0.02, help="loss that is not called a regression")
    parser.add_argument("--force", action="store_true", help="compare across fingerprints, and say so")
    args = parser.parse_args()
    if not 0 <= args.tolerance < 1:
        raise InputError(f"--tolerance must be in [0, 1), got {args.tolerance}")
    sides = [load(path) for path in (args.old, args.new) if path]
    for result in (x for side in sides for x in side.values() if "tool" in x["workload"]):
        show_foreign(result)
    if not args.new:
        show([x for x in sides[0].values() if "tool" not in x["workload"]])
        return int(any(x["validity"]["status"] == "INVALID" for x in sides[0].values()))
    found = compare(*alike(*sides), args.tolerance, args.force)
    console = Console(width=110)
    for left in found.left_out:
        console.print(f"left out: {left}", markup=False)
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


def load(path: Path) -> dict[str, Result]:
    """The results at ``path``, by name. Raises :class:`InputError`."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_dir() and not (path / others.AIPERF_RECORDS).is_file():
        return load_folder(path)
    try:
        return {path.stem: others.read(path)}
    except others.Ours:
        return {path.stem: load_result(path)}


def alike(old: dict[str, Result], new: dict[str, Result]) -> tuple[dict[str, Result], dict[str, Result]]:
    """Two sides of one result each are compared whatever their names."""
    if len(old) == len(new) == 1:
        return {"result": next(iter(old.values()))}, {"result": next(iter(new.values()))}
    return old, new


if __name__ == "__main__":
    run_cli(main)
