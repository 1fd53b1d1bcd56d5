"""Print the short tables of a results folder: baseline, engine, the load levels through Triton, and the ratios.

python scripts/show_results.py results/local
"""

from __future__ import annotations

from pathlib import Path

from llama_engine.errors import run_cli
from llama_engine.flags import Parser
from llama_engine.measure.result import load_folder
from llama_engine.report.show import show


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("results_dir", type=Path)
    folder = parser.parse_args().results_dir
    show(load_folder(folder).values())
    if (report := folder / "PERFORMANCE_REPORT.md").is_file():
        print(f"report: {report}")


if __name__ == "__main__":
    run_cli(main)
