"""PERFORMANCE_REPORT.md and the README's table, from the JSON alone.

The templates beside this file are Markdown in Jinja2. ``figure("base.summary.mbu", ".3f")`` in them is a figure: a file
(see :class:`Story`), a path, a format. Where each came from goes into a file beside the report. A line none of whose
figures was measured is left out, and so is a table without rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from llama_engine.config import DEFAULT_MODEL
from llama_engine.report.ladder import CACHED, choices, rungs
from llama_engine.report.pareto import Point, loads, points
from llama_engine.report.show import CONDITIONS
from llama_engine.report.story import STACK_NAMES, Derived, Story, roofline_points, waterfall_steps
from llama_engine.report.tournaments import Table, tables

README_MARKS = ("<!-- results:begin -->", "<!-- results:end -->")
NONE = "not measured"
MARK = re.compile("\x02(\\d*)\x03")  # before each figure of a filled template: its number, "" where not measured
JINJA = Environment(
    loader=PackageLoader("llama_engine.report", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
WHERE = {"engine": "in process", "triton": "through Triton", "whole": "through Triton, non-streaming"}


@dataclass(frozen=True)
class Load:
    """What a table has a row for: where its figures lie, and its name."""

    at: str  # file alias and path, such as "triton.levels.3"
    name: str
    users: int = 1  # requests at once
    mark: str = ""  # of an INVALID one


@dataclass
class Page:
    """One machine's figures, formatted for a template and remembered with their sources."""

    story: Story
    folder: str = ""  # from the page to the machine's JSON, such as "cpu/"
    cited: list[tuple[str, list[str]]] = field(default_factory=list)  # (text, "file:path"s) of each figure

    def figure(self, what: str | Derived, form: str = "", per: float = 1) -> str:
        """A value in units of ``per`` and in a format specification, by default two decimals of a float.

        ``what`` is ``alias.path`` of the value, or a value computed from several.
        """
        value, places = (self.story.at(what), (what,)) if isinstance(what, str) else what
        if value is None:
            return f"\x02\x03{NONE}"
        value = value if per == 1 else value / per
        return self.cite(format(value, form or (",.2f" if isinstance(value, float) else "")), places)

    def cite(self, text: str, places: Sequence[str]) -> str:
        """``text`` as a figure that came from ``places``."""
        split = (place.split(".", 1) for place in places)
        return self._cite(text, [f"{self.folder}{self.story.aliases[file]}:{path}" for file, path in split])

    def _cite(self, text: str, sources: list[str]) -> str:
        self.cited.append((text, sources))
        return f"\x02{len(self.cited) - 1}\x03{text}"

    def ratio(self, metric: str) -> str:
        """The speed-up with its interval and verdict; the reason in its place while it is withheld."""
        ratio = self.story.speedup(metric)
        if ratio is None:
            return "none shown" if self.story.withheld() else NONE
        low, high = ratio["ci95"]
        text = f"**{ratio['ratio']:.2f}x** [{low:.2f}, {high:.2f}] {ratio['verdict']}"
        return self.cite(text, [f"comparison.speedup.{metric}"])

    @property
    def labels(self) -> dict[str, str]:
        """Names of the two stacks by file alias; an INVALID one says so."""
        story, names = self.story, {"base": STACK_NAMES["transformers"], "engine": STACK_NAMES[self.story.backend]}
        return {x: f"{name}{' (INVALID)' * (story.aliases[x] in story.invalid)}" for x, name in names.items()}

    @property
    def stacks(self) -> list[Load]:
        """The stacks measured in process, at one request."""
        return [Load(x, name) for x, name in self.labels.items() if self.story.aliases[x] in self.story.files]

    def levels(self, *files: str) -> Iterator[Load]:
        """The loads of several requests at once, or through Triton."""
        for file in files:
            for i, level in self.story.levels(file):
                users, mark = level["concurrency"], self.story.mark(file, level)
                name = f"{WHERE[file]}, {users} at once{' (INVALID)' if mark else ''}"
                yield Load(f"{file}.levels.{i}", name, users, mark)

    def costs(self) -> Iterator[tuple[str, Derived, str]]:
        """(name, seconds a million tokens take, place of the energy a token takes) of every load."""
        alone = [Load(x.at, f"{x.name}, 1 at once") for x in self.stacks]
        for load in [*alone, *self.levels("engine", "triton", "whole")]:
            place = f"{load.at}.summary.output_tokens_per_s.p50"
            rate = self.story.at(place)
            yield load.name, Derived(rate and 1e6 / rate, (place,)), f"{load.at}.summary.energy_j_per_token"

    @property
    def has_points(self) -> bool:
        """Whether there is a picture of what a GPU gives against what a user sees."""
        return any(loads(self.story))

    def dollars(self) -> Iterator[tuple[Point, str, str, str]]:
        """(load, tokens/s a user sees, tokens/s of the GPU, $ per million tokens) at the price that was given."""
        for x in points(self.story):
            file, _, path = x.at.partition(":")
            places = [f"{self.folder}{file}:{path}{'.' * bool(path)}{key}" for key in ("summary", "samples")]
            spans = ((x.per_user, x.per_user_ci, ",.1f"), (x.per_gpu, x.per_gpu_ci, ",.1f"))
            spans += ((x.dollars, x.dollars_ci, ",.3f"),)
            cells = (f"{value:{form}} [{low:{form}}, {high:{form}}]" for value, (low, high), form in spans)
            yield (x, *(self._cite(cell, places) for cell in cells))

    def scaling(self) -> tuple[int, int, Derived, Derived] | None:
        """(fewest, most requests, growth of tokens/s, its share of linear growth) of the served loads that count."""
        served = [load for load in self.levels("triton") if not load.mark]
        if len(served) < 2 or not self.story.valid("triton"):
            return None
        first, last = served[0], served[-1]
        places = tuple(f"{load.at}.summary.output_tokens_per_s.p50" for load in (first, last))
        growth = self.story.at(places[1]) / self.story.at(places[0])
        return first.users, last.users, Derived(growth, places), Derived(growth / (last.users / first.users), places)

    def conditions(self) -> Iterator[tuple[Load, str, str]]:
        """(condition under which answers were asked for again, kernels, share that changed) of each that occurred."""
        for i, variant in enumerate(self.story.get("determinism", "variants") or []):
            for j, x in enumerate(variant["conditions"]):
                at = f"determinism.variants.{i}.conditions.{j}"
                if x["compared"]:
                    low, high = x["ci95"]
                    text = f"{x['share']:.1%} [{low:.1%}, {high:.1%}]"
                    name = CONDITIONS[x["kind"]].format(**x)
                    yield Load(at, name), variant["asked"], self.cite(text, [f"{at}.share", f"{at}.ci95"])

    def price(self) -> Iterator[tuple[str, str]]:
        """(load, ratio) of what batch invariance costs, where it costs anything measured."""
        price = self.story.get("determinism", "price") or {"loads": []}
        for i, load in enumerate(price["loads"]):
            if "ratio" in load:
                low, high = load["ci95"]
                name = f"kernels {price['of']} over {load['invariant']}, {load['concurrency']} at once"
                text = f"{load['ratio']:.3f}x [{low:.3f}, {high:.3f}] {load['verdict']}"
                yield name, self.cite(text, [f"determinism.price.loads.{i}"])

    def kernels(self) -> Iterator[Load]:
        """The kernels of each stack that take most of the time."""
        for stack, profile in (self.story.get("profile", "stacks") or {}).items():
            for i, kernel in enumerate(profile["top_kernels"][:6]):
                name = f"{STACK_NAMES[stack]}: `{kernel['name'][:70]}`"
                yield Load(f"profile.stacks.{stack}.top_kernels.{i}", name)

    def tournaments(self, *, largest: bool = False) -> list[Table]:
        """Other engines on this machine; ``largest`` as in :func:`llama_engine.report.tournaments.tables`."""
        return list(tables(self.story, self.folder, self._cite, largest=largest))

    def versions(self) -> list[tuple[str, str]]:
        """(library, place of its version)."""
        found = self.story.get("any", "environment.software") or {}
        return [(x, f"any.environment.software.{x}") for x, y in found.items() if y and x not in ("os", "cuda")]

    def warnings(self) -> list[str]:
        """What is INVALID, or to be read with care, and why."""
        invalid = [f"**INVALID** {x}: {'; '.join(why)}. It enters no ratio." for x, why in self.story.invalid.items()]
        return invalid + [f"**Caution** {x}: {'; '.join(why)}." for x, why in self.story.cautions.items()]

    def gate_reasons(self) -> str:
        """Why the accuracy gate failed or counts for less, in brackets."""
        reasons = [self.story.quick_gate, *(self.story.get("accuracy", "gate.reasons") or [])]
        return f" ({'; '.join(filter(None, reasons))})" if any(reasons) else ""

    def commands(self) -> list[str]:
        """The command that measures all of this, then the one behind each file."""
        story, name = self.story, self.story.any["model"]["name"]
        flags = f"--device {story.get('any', 'environment.device')}"
        if story.synthetic:
            flags += f" --synthetic {name.removeprefix('synthetic-')}"
        elif name.lower() != DEFAULT_MODEL:
            flags += " --model-dir DIR"
        if story.quick_gate:
            flags += " --quick"
        each = [result["environment"].get("command", "") for result in story.files.values()]
        each = dict.fromkeys(re.sub(r" --output /\S+", "", command) for command in each)  # a temporary file
        python = [f"python {command}" for command in each if ".py" in command]
        return [f"./scripts/run_all.sh {flags} --name {story.name}", *python]


def _fill(template: str, cited: list[tuple[str, list[str]]], **values: Any) -> tuple[str, dict[str, dict[str, str]]]:
    """The template filled, without the lines and tables that have no figures; ``{section: {source: figures}}``."""
    lines, section, found = [], "", {}
    for line in JINJA.get_template(template).render(values).split("\n"):
        section = line[3:] if line.startswith("## ") else section
        numbers = MARK.findall(line)
        if any(numbers) or not numbers:
            lines.append(MARK.sub("", line))
        for text, sources in (cited[int(number)] for number in numbers if number):
            for source in sources:
                shown = found.setdefault(section, {}).setdefault(source, [])
                shown += [text] * (text not in shown)
    text = re.sub(r"^\|.*\n\| ---.*\n(?!\|)", "", "\n".join(lines), flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text, {name: {source: "; ".join(shown) for source, shown in x.items()} for name, x in found.items()}


def render(story: Story, *, headline: bool = False, others: Sequence[Story] = ()) -> tuple[str, str]:
    """The whole report as Markdown, and its sources: ``{section: {"file:path": the figures that it gave}}`` as JSON.

    As ``headline`` it lies one folder above its machine's JSON and gives ``others`` a section.
    """
    page = Page(story, f"{story.name}/" if headline else "")
    more = [Page(other, f"{other.name}/", page.cited) for other in others]
    steps = waterfall_steps(story)
    values = {"page": page, "story": story, "figure": page.figure, "headline": headline, "others": more}
    values |= {"roofline": roofline_points(story), "waterfall": steps if len(steps) > 1 else []}
    values["ladder"] = rungs(story)
    values |= {"choices": list(choices(story, values["ladder"])), "cached": CACHED}
    text, sources = _fill("report.md.j2", page.cited, **values)
    return text, json.dumps(sources, indent=1, ensure_ascii=False) + "\n"


def readme_block(stories: Sequence[Story]) -> str:
    """The README's results: one table over all published machines, the headline first."""
    cited: list[tuple[str, list[str]]] = []
    pages = [Page(story, cited=cited) for story in stories]
    text, _ = _fill("readme.md.j2", cited, pages=pages)
    return f"{README_MARKS[0]}\n{text}{README_MARKS[1]}"


def replace_block(text: str, block: str) -> str | None:
    """``text`` with the README block between the marks replaced, or None when the marks are missing."""
    before, begin, rest = text.partition(README_MARKS[0])
    _, end, after = rest.partition(README_MARKS[1])
    return before + block + after if begin and end else None
