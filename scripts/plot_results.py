"""Draw the pictures and write PERFORMANCE_REPORT.md from the result files of one machine.

Method: reads --results-dir/*.json and nothing else. --headline NAME renders results/NAME there and into results/ too,
and refreshes the README's table; --check writes nothing and fails when a report that the front page names, a picture or
the README differs from what its JSON says.
Output: PERFORMANCE_REPORT.md and six pictures (executive_summary, performance_comparison, triton_scaling,
ttft_percentiles, waterfall, roofline) beside the JSON.

    python scripts/plot_results.py --results-dir results/local
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from PIL import Image

from llama_engine.errors import InputError, RunError, run_cli
from llama_engine.files import write_text
from llama_engine.report.plots import draw_all
from llama_engine.report.render import readme_block, render, replace_block
from llama_engine.report.story import Story

REPORT = "PERFORMANCE_REPORT.md"

PEERS = Path(__file__).parents[1] / "benchmarks/data/peers.json"  # engines measured elsewhere, for the README


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", type=Path, default=Path("results/local"))
    parser.add_argument("--headline", metavar="NAME", help="publish results/NAME as the headline, into results/ too")
    parser.add_argument("--check", action="store_true", help="fail when a committed page or picture is stale")
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository")
    args = parser.parse_args()
    results, readme = args.root / "results", args.root / "README.md"
    if args.check:
        check(results, readme)
    elif args.headline:
        publish(results, readme, args.headline)
    else:
        story = Story.load(args.results_dir)
        write_text(args.results_dir / REPORT, render(story))
        for path in [args.results_dir / REPORT, *draw_all(story, args.results_dir)]:
            print(path)


def published(results: Path, headline: str, front: str | None = None) -> list[Story]:
    """Every machine's results, the headline first; ``local`` is nobody else's. With ``front``, only those that this
    page names: another folder, such as run_all.sh --name makes, is not published yet."""
    folders = {path.parent for path in results.glob("*/*.json") if path.parent.name != "local"}
    if front is not None:
        folders = {folder for folder in folders if folder.name == headline or f"({folder.name}/{REPORT})" in front}
    if results / headline not in folders:
        names = ", ".join(sorted(folder.name for folder in folders)) or "none"
        raise InputError(f"results/{headline} holds no result files; there are: {names}")
    return [Story.load(folder) for folder in sorted(folders, key=lambda folder: (folder.name != headline, folder))]


def pages(results: Path, readme: Path, stories: list[Story]) -> dict[Path, str]:
    """Every report, the README, and what they should say."""
    wanted = {results / story.name / REPORT: render(story) for story in stories}
    wanted[results / REPORT] = render(stories[0], headline=True, others=stories[1:])
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    updated = replace_block(text, readme_block(stories, json.loads(PEERS.read_text())))
    if updated is None:
        raise RunError(f"{readme} lacks the marks <!-- results:begin --> and <!-- results:end -->: add them")
    return wanted | {readme: updated}


def publish(results: Path, readme: Path, headline: str) -> None:
    stories = published(results, headline)
    for path, text in pages(results, readme, stories).items():
        write_text(path, text)
        print(path)
    for story in stories:
        draw_all(story, results / story.name)
    draw_all(stories[0], results)


def check(results: Path, readme: Path) -> None:
    if not (readme.is_file() and results.is_dir()):
        raise InputError(f"{readme} or {results} is missing: give --root the repository")
    page = results / REPORT
    front = page.read_text(encoding="utf-8") if page.is_file() else ""
    found = re.match(r"<!-- headline: (\S+) -->", front)
    if not found:
        raise RunError(f"{page} is missing or names no headline: run scripts/plot_results.py --headline NAME")
    stories = published(results, found[1], front)
    wanted = pages(results, readme, stories).items()
    stale = [path for path, text in wanted if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for folder, story in [(results, stories[0]), *((results / story.name, story) for story in stories)]:
        pictures = sorted(folder.glob("*.png")) or [folder / "*.png"]
        stale += [path for path in pictures if not path.exists() or source_of(path) != story.sha256]
    if stale:
        names = ", ".join(map(str, stale))
        raise RunError(f"stale: {names}: run scripts/plot_results.py --headline {found[1]}")
    print(f"{len(stories)} machines, headline {found[1]}: reports, pictures and README agree with the JSON")


def source_of(picture: Path) -> str | None:
    """The hash of the results that a picture was drawn from."""
    with Image.open(picture) as image:
        return image.info.get("Source-SHA256")


if __name__ == "__main__":
    run_cli(main)
