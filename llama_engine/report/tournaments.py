"""Tournaments as tables: a row a load, a column a contestant, each figure with its place in the JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llama_engine.measure.result import Result
from llama_engine.report.ladder import rungs
from llama_engine.report.story import Story

Cite = Callable[[str, list[str]], str]  # a figure's text and its "file:path"s -> the text, remembered
Cell = tuple[str, int]  # workload, requests at once


@dataclass(frozen=True)
class Table:
    """``rows`` begin with their names; ``note`` says when and how, ``invalid`` why a figure has a star; ``failed`` are
    the contestants that failed the accuracy gate: they and what is measured against them have no ratio."""

    columns: list[str]
    rows: list[list[str]]
    note: str
    invalid: list[str]
    failed: list[str]


def tables(story: Story, folder: str, cite: Cite, *, largest: bool = False) -> Iterator[Table]:
    """A table a tournament of this machine; with ``largest`` each workload at its highest load. Figures entered by hand
    stand in for those that nobody measured here: not beside them, and never with ``largest``."""
    measured = any(not result.get("by_hand") for result in story.tournaments.values())
    for name, result in story.tournaments.items():
        if result.get("by_hand") and (largest or measured):
            continue
        yield _table(story, folder, f"tournaments/{name}", result, cite, largest)


def _table(story: Story, folder: str, file: str, result: Result, cite: Cite, largest: bool) -> Table:
    by_hand = bool(result.get("by_hand"))
    levels = {(x["contestant"], _cell(x)): (i, x) for i, x in enumerate(result["levels"])}
    cells = list(dict.fromkeys(cell for _, cell in levels))
    if largest:
        most: dict[str, Cell] = {}
        for cell in cells:
            most[cell[0]] = max(cell, most.get(cell[0], cell))
        cells = list(most.values())
    ratios = {
        (x["contestant"], (x["workload"], x["concurrency"])): i
        for i, x in enumerate(result["ratios"])
        if x["metric"] == "output_tokens_per_s"
    }
    names = [x["name"] for x in result["contestants"]]
    failed = _failed(story, result)
    if names[0] in failed:
        ratios = {}

    def rate(name: str, cell: Cell) -> str:
        if (name, cell) not in levels:
            return ""
        i, level = levels[name, cell]
        if not (found := level["summary"].get("output_tokens_per_s")):
            return "*"
        text = cite(_number(found["p50"], cell), [f"{folder}{file}:levels.{i}.summary.output_tokens_per_s.p50"])
        if name not in failed and (at := ratios.get((name, cell))) is not None:
            ratio = result["ratios"][at]
            low, high = ratio["ci95"]
            said = f"**{ratio['ratio']:.2f}x** [{low:.2f}, {high:.2f}]"
            text += ", " + cite(said, [f"{folder}{file}:ratios.{at}"])
        return text + ("" if by_hand or level["validity"]["status"] == "VALID" else "*")

    def first(name: str, cell: Cell) -> str:
        i, level = levels.get((name, cell), (0, {"summary": {}}))
        found = level["summary"].get("ttft_ms")
        return cite(f"{found['p50']:,.1f}", [f"{folder}{file}:levels.{i}.summary.ttft_ms.p50"]) if found else ""

    rows = []
    for cell in cells:
        said = f"{cell[0]}, {cell[1]} at once"
        own = [_own(story, folder, cell, "output_tokens_per_s", cite)] if by_hand else []
        rows.append([f"{said}, tokens/s", *(rate(name, cell) for name in names), *own])
        if cell[1] == 1 and not largest:
            own = [_own(story, folder, cell, "ttft_ms", cite)] if by_hand else []
            rows.append([f"{said}, TTFT p50, ms", *(first(name, cell) for name in names), *own])
    invalid = [
        f"{name}, {cell[0]} at {cell[1]}: {'; '.join(level['validity']['reasons'])}"
        for (name, cell), (_, level) in levels.items()
        if cell in cells and not by_hand and level["validity"]["status"] == "INVALID"
    ]
    if largest and invalid:
        invalid = ["for reasons that stand on the machine's page"]
    invalid += [f"{x['name']} left at {x['failed']}" for x in result["contestants"] if "failed" in x]
    columns = [f"{name} †" if name in failed else name for name in names]
    columns += ["**this engine**, INT8 weight-only"] if by_hand else []
    return Table(columns, rows, _note(result), invalid, failed)


def _failed(story: Story, result: Result) -> list[str]:
    """The contestants whose scheme failed this folder's accuracy gate."""
    gates = [("engine", "accuracy"), *((rung.file, rung.accuracy) for rung in rungs(story))]
    lost = {_scheme(story.get(x, "engine") or {}) for x, gate in gates if story.get(gate, "gate.status") == "FAILED"}
    return [x["name"] for x in result["contestants"] if (about := x.get("about")) and _scheme(about) in lost]


def _scheme(engine: dict) -> tuple:
    config = engine.get("config", {})
    return engine.get("weights_sha256"), config.get("lm_head"), config.get("kv_cache")


def _own(story: Story, folder: str, cell: Cell, metric: str, cite: Cite) -> str:
    """This engine at the same load in its own run, which stands beside figures of another."""
    places = {1: "summary"} | {level["concurrency"]: f"levels.{i}.summary" for i, level in story.levels("engine")}
    at = f"{places.get(cell[1])}.{metric}.p50"
    value = story.get("engine", at) if cell[1] in places else None
    if value is None:
        return ""
    level = dict(story.levels("engine")).get(int(at.split(".")[1]), {}) if at.startswith("levels") else {}
    mark = story.mark("engine", level)
    form = f"{value:,.1f}" if metric == "ttft_ms" else _number(value, cell)
    return cite(form, [f"{folder}{story.aliases['engine']}:{at}"]) + mark


def _number(value: float, cell: Cell) -> str:
    return f"{value:,.1f}" if cell[1] == 1 else f"{value:,.0f}"


def _cell(level: dict) -> Cell:
    return level["workload"]["traffic"]["name"], level["concurrency"]


def _note(result: Result) -> str:
    if note := result.get("note"):
        return note
    memory = "; ".join(f"{x['name']}: GPU memory {x['memory']}" for x in result["contestants"])
    over = result["contestants"][0]["name"]
    return f"Ratios over {over}, {result['method']}. {memory}. Measured on {result['environment'].get('time_utc', '')}."
