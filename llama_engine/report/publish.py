"""What the repository shows of its results: a report a machine, the headline's above them, and the README's table.

The headline machine's report and pictures lie in results/ itself, beside the folder of its JSON, and nowhere else.
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from llama_engine.errors import InputError, RunError
from llama_engine.files import write_text
from llama_engine.measure.compare import judge_again
from llama_engine.measure.result import load_folder, result_files, write_result
from llama_engine.report.page import PAGE, render_page, source_of_page
from llama_engine.report.plots import PICTURES, draw_all
from llama_engine.report.render import readme_block, render, replace_block
from llama_engine.report.story import Story

REPORT, SOURCES = "PERFORMANCE_REPORT.md", "PERFORMANCE_REPORT.sources.json"


def draw(folder: Path, price_per_hour: float | None = None) -> list[Path]:
    """Write report, sources, page and pictures beside the JSON of one machine; returns their paths."""
    story = Story.load(folder, price_per_hour)
    for name, text in zip((REPORT, SOURCES, PAGE), (*render(story), render_page(story))):
        write_text(folder / name, text)
    return [folder / REPORT, folder / SOURCES, folder / PAGE, *draw_all(story, folder)]


def judge(folder: Path) -> list[Path]:
    """Rewrite the results of one machine whose verdicts are not those of today's rules; returns their paths."""
    results = load_folder(folder)
    changed = {folder / f"{name}.json": results[name] for name in judge_again(results)}
    return [write_result(path, result, force=True) for path, result in changed.items()]


def publish(results: Path, readme: Path, headline: str) -> list[Path]:
    """Write every machine's report and pictures, ``headline``'s into ``results``, and the README's table."""
    stories = published(results, headline)
    wanted = pages(results, readme, stories)
    for path, text in wanted.items():
        write_text(path, text)
    for folder, story in folders(results, stories).items():
        drawn = draw_all(story, folder)
        write_text(folder / PAGE, render_page(story))
        for path in {folder / name for name in PICTURES}.difference(drawn):
            path.unlink(missing_ok=True)  # of another machine, which led the results before
    for path in copies(results, headline):
        path.unlink()
    return list(wanted)


def check(results: Path, readme: Path) -> str:
    """What agrees with the JSON, in a line. Raises :class:`RunError` that names every stale page and picture."""
    if not (readme.is_file() and results.is_dir()):
        raise InputError(f"{readme} or {results} is missing: give --root the repository")
    page = results / REPORT
    front = page.read_text(encoding="utf-8") if page.is_file() else ""
    found = re.match(r"<!-- headline: (\S+) -->", front)
    if not found:
        raise RunError(f"{page} is missing or names no headline: run scripts/plot_results.py --headline NAME")
    stories = published(results, found[1], front)
    wanted = pages(results, readme, stories)
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for folder, story in folders(results, stories).items():
        shown = {folder / name for name in re.findall(r"\((\w+\.png)\)", wanted[folder / REPORT])}
        pictures = sorted(shown.union(folder.glob("*.png")))
        stale += [path for path in pictures if not path.exists() or source_of(path) != story.sha256]
        page = folder / PAGE
        if not page.exists() or source_of_page(page.read_text(encoding="utf-8")) != story.sha256:
            stale.append(page)
    for story in stories:
        judged = load_folder(results / story.name)
        stale += [results / story.name / f"{name}.json (its verdict)" for name in judge_again(judged)]
    if stale := stale + copies(results, found[1]):
        names = ", ".join(map(str, stale))
        raise RunError(f"stale: {names}: run scripts/plot_results.py --judge --headline {found[1]}")
    return f"{len(stories)} machines, headline {found[1]}: reports, pictures and README agree with the JSON"


def published(results: Path, headline: str, front: str | None = None) -> list[Story]:
    """Every machine's results, the headline first; ``local`` is nobody else's. With ``front``, only those that this
    page names: another folder, such as run_all.sh --name makes, is not published yet."""
    found = set(machines(results))
    if front is not None:
        found = {folder for folder in found if folder.name == headline or f"({folder.name}/{REPORT})" in front}
    if results / headline not in found:
        names = ", ".join(sorted(folder.name for folder in found)) or "none"
        raise InputError(f"results/{headline} holds no result files; there are: {names}")
    return [Story.load(folder) for folder in sorted(found, key=lambda folder: (folder.name != headline, folder))]


def machines(results: Path) -> list[Path]:
    """The folders of results that may be published."""
    return sorted(folder for folder in results.iterdir() if folder.name != "local" and result_files(folder))


def folders(results: Path, stories: list[Story]) -> dict[Path, Story]:
    """Where each machine's report and pictures lie."""
    return {results: stories[0]} | {results / story.name: story for story in stories[1:]}


def copies(results: Path, headline: str) -> list[Path]:
    """What the headline's own folder holds of a report, as ``draw`` leaves it there."""
    paths = [results / headline / name for name in (REPORT, SOURCES, PAGE, *PICTURES)]
    return [path for path in paths if path.exists()]


def pages(results: Path, readme: Path, stories: list[Story]) -> dict[Path, str]:
    """Every report, its sources and the README, and what they should say."""
    wanted = {}
    for folder, story in folders(results, stories).items():
        headline = folder == results
        texts = render(story, headline=headline, others=stories[1:] if headline else ())
        wanted |= {folder / name: text for name, text in zip((REPORT, SOURCES), texts)}
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    updated = replace_block(text, readme_block(stories))
    if updated is None:
        raise RunError(f"{readme} lacks the marks <!-- results:begin --> and <!-- results:end -->: add them")
    return wanted | {readme: updated}


def source_of(picture: Path) -> str | None:
    """The hash of the results that a picture was drawn from."""
    with Image.open(picture) as image:
        return image.info.get("Source-SHA256")
