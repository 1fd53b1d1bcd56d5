"""Print the short table of a results folder: baseline, engine, ratio, and the load levels through Triton.

python scripts/show_results.py results/local
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_engine.errors import InputError, run_cli
from llama_engine.measure.result import load_folder


def speed(summary: dict[str, Any]) -> str:
    return f"{summary['output_tokens_per_s']['p50']:,.1f} tok/s"


def ttft(summary: dict[str, Any]) -> str:
    return f"{summary['ttft_ms']['p50']:.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results_dir", type=Path)
    folder = parser.parse_args().results_dir
    results = load_folder(folder)
    if not results:
        raise InputError(f"{folder} holds no results: run scripts/run_all.sh")
    table = Table(title=f"{folder}", title_justify="left")
    for column, justify in (("", "left"), ("output speed", "right"), ("TTFT p50", "right"), ("MBU", "right")):
        table.add_column(column, justify=justify)
    for result in results.values():
        if result["benchmark"] not in ("baseline", "optimized", "triton"):
            continue
        name = f"{result['benchmark']} ({result['backend']})"
        status = "" if result["validity"]["status"] == "VALID" else " INVALID"
        if result["benchmark"] != "triton":
            mbu = result["summary"].get("mbu")
            summary = result["summary"]
            table.add_row(name + status, speed(summary), ttft(summary), f"{mbu:.2f}" if mbu else "")
            continue
        for level in result["levels"]:
            table.add_row(
                f"triton, {level['concurrency']} at once{status}", speed(level["summary"]), ttft(level["summary"]), ""
            )
    console = Console()
    console.print(table)
    comparison = results.get("comparison")
    for name, ratio in (comparison or {}).get("speedup", {}).items():
        low, high = ratio["ci95"]
        console.print(f"{name}: {ratio['ratio']:.2f}x (95 % {low:.2f} to {high:.2f}), {ratio['verdict']}")
    console.print(f"report: {folder / 'PERFORMANCE_REPORT.md'}")


if __name__ == "__main__":
    run_cli(main)
