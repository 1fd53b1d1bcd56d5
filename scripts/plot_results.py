"""Draw the pictures and write PERFORMANCE_REPORT.md from the result files of one machine.

Method: reads --results-dir/*.json and nothing else. --headline NAME renders results/NAME there and into results/ too,
and refreshes the README's table; --check writes nothing and fails when a committed report, picture or README differs
from what its JSON says.
Output: PERFORMANCE_REPORT.md and six pictures (executive_summary, performance_comparison, triton_scaling,
ttft_percentiles, waterfall, roofline) beside the JSON.

    python scripts/plot_results.py --results-dir results/local
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from llama_engine.errors import InputError, RunError, run_cli
from llama_engine.measure import definitions
from llama_engine.measure.plots import draw_all
from llama_engine.measure.report import readme_block, render, replace_block
from llama_engine.measure.result import load_folder, write_text
from llama_engine.measure.story import Story

REPORT = "PERFORMANCE_REPORT.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", type=Path, default=Path("results/local"))
    parser.add_argument("--headline", metavar="NAME", help="publish results/NAME as the headline, into results/ too")
    parser.add_argument("--check", action="store_true", help="fail when a committed page or picture is stale")
    parser.add_argument(
        "--definitions", metavar="TOOL", help="print the samples as ours, vllm, aiperf, ... define them"
    )
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository")
    args = parser.parse_args()
    results = args.root / "results"
    if args.definitions:
        if args.definitions not in definitions.DEFINITIONS:
            raise InputError(f"--definitions knows {', '.join(definitions.DEFINITIONS)}, not {args.definitions!r}")
        print_definitions(args.results_dir, args.definitions)
    elif args.check:
        check(results, args.root / "README.md")
    elif args.headline:
        publish(results, args.headline, args.root / "README.md")
    else:
        story = Story.load(args.results_dir)
        write_text(args.results_dir / REPORT, render(story))
        for path in [args.results_dir / REPORT, *draw_all(story, args.results_dir)]:
            print(path)


def print_definitions(folder: Path, tool: str) -> None:
    """Every result's samples, levels included, under another tool's names."""
    out = Console()
    for name, result in load_folder(folder).items():
        parts = [(name, result["samples"])]
        parts += [
            (f"{name}, {x.get('concurrency', '?')} at once", x.get("samples", {})) for x in result.get("levels", [])
        ]
        for title, samples in parts:
            if not {"ttft_ms", "latency_s", "output_tokens"} <= set(samples):
                continue
            table = Table(title=f"{title}, as {tool} defines it", title_justify="left")
            for column in ("metric", "formula", "mean", "p50", "p90", "p99"):
                table.add_column(column)
            for metric, formula, figures in definitions.table(tool, samples):
                table.add_row(metric, formula, *(f"{figures[key]:.2f}" for key in ("mean", "p50", "p90", "p99")))
            out.print(table)


def published(results: Path) -> dict[str, Story]:
    """Every committed machine's results, by name; ``local`` is nobody else's."""
    folders = sorted(path.parent for path in results.glob("*/*.json") if path.parent.name != "local")
    return {folder.name: Story.load(folder) for folder in dict.fromkeys(folders)}


def pages(results: Path, stories: dict[str, Story], headline: str) -> dict[Path, str]:
    """Every report and what it should say. Raises :class:`InputError` for an unknown headline."""
    if headline not in stories:
        raise InputError(f"results/{headline} holds no result files; there are: {', '.join(stories) or 'none'}")
    others = [story for name, story in stories.items() if name != headline]
    wanted = {results / name / REPORT: render(story) for name, story in stories.items()}
    return wanted | {results / REPORT: render(stories[headline], headline=True, others=others)}


def ordered(stories: dict[str, Story], headline: str) -> list[Story]:
    return [stories[headline], *(story for name, story in stories.items() if name != headline)]


def publish(results: Path, headline: str, readme: Path) -> None:
    stories = published(results)
    for path, text in pages(results, stories, headline).items():
        write_text(path, text)
        print(path)
    for name, story in stories.items():
        draw_all(story, results / name)
    draw_all(stories[headline], results)
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    updated = replace_block(text, readme_block(ordered(stories, headline)))
    if updated is None:
        raise RunError(f"{readme} lacks the marks <!-- results:begin --> and <!-- results:end -->: add them")
    write_text(readme, updated)


def check(results: Path, readme: Path) -> None:
    stories = published(results)
    if not stories:
        print("nothing is published yet: nothing to check")
        return
    front = results / REPORT
    found = re.match(r"<!-- headline: (\S+) -->", front.read_text(encoding="utf-8") if front.is_file() else "")
    if not found:
        raise RunError(f"{front} is missing or names no headline: run scripts/plot_results.py --headline NAME")
    headline = found.group(1)
    stale = [
        str(path)
        for path, text in pages(results, stories, headline).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for folder, story in [(results, stories[headline]), *((results / name, story) for name, story in stories.items())]:
        pictures = sorted(folder.glob("*.png"))
        stale += [str(path) for path in pictures if Image.open(path).info.get("Source-SHA256") != story.sha256]
        if not pictures:
            stale.append(f"{folder}/*.png")
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if replace_block(text, readme_block(ordered(stories, headline))) != text:
        stale.append(str(readme))
    if stale:
        raise RunError(f"stale: {', '.join(stale)}: run scripts/plot_results.py --headline {headline}")
    print(f"{len(stories)} machines, headline {headline}: reports, pictures and README agree with the JSON")


if __name__ == "__main__":
    run_cli(main)
