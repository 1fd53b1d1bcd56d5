"""Draw the pictures and write PERFORMANCE_REPORT.md from the result files of one machine.

Method: reads --results-dir/*.json and nothing else; --judge renews the verdicts in them, and no figure. --headline NAME
renders every machine of results/, results/NAME into results/ itself, and refreshes the README's table; --check writes
nothing and fails when a report that the front page names, its sources, a picture, a verdict or the README differs from
what its JSON says.
Output: PERFORMANCE_REPORT.md, PERFORMANCE_REPORT.sources.json (the file and key behind each figure), report.html (the
same with interactive plots, for a browser without a network) and seven pictures (executive_summary,
performance_comparison, triton_scaling, ttft_percentiles, waterfall, roofline, pareto) beside the JSON.

    python scripts/plot_results.py --results-dir results/local
"""

from __future__ import annotations

import math
from pathlib import Path

from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.report import publish


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--results-dir", type=Path, default=Path("results/local"))
    parser.add_argument("--headline", metavar="NAME", help="publish all of results/, with results/NAME on top")
    parser.add_argument("--judge", action="store_true", help="first rewrite the verdicts of results by today's rules")
    parser.add_argument("--check", action="store_true", help="fail when a committed page, picture or verdict is stale")
    parser.add_argument("--price-per-hour", type=float, help="$ of one GPU, or machine, for $ per million tokens")
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository")
    args = parser.parse_args()
    if args.price_per_hour is not None and not 0 < args.price_per_hour < math.inf:
        raise InputError(f"--price-per-hour must be positive, got {args.price_per_hour:g}")
    if args.price_per_hour and (args.headline or args.check):
        raise InputError("--price-per-hour goes with --results-dir: published pages name no price")
    results, readme = args.root / "results", args.root / "README.md"
    if args.judge:
        folders = publish.machines(results) if args.headline else [args.results_dir]
        for folder in folders:
            print(*(f"judged again: {path}\n" for path in publish.judge(folder)), sep="", end="")
    if args.check:
        print(publish.check(results, readme))
    elif args.headline:
        print(*publish.publish(results, readme, args.headline), sep="\n")
    else:
        print(*publish.draw(args.results_dir, args.price_per_hour), sep="\n")


if __name__ == "__main__":
    run_cli(main)
