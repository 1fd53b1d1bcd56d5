"""PERFORMANCE_REPORT.md and the README's table, from the JSON alone. Every figure names its file and key in a comment.

``report.md`` is the report with fields. ``{base.summary.mbu:.3f}`` is a figure: a file (see :class:`Story`), a path, a
format; ``!`` converts it. ``{*levels}`` in front of a line repeats it for each item of a list. A line none of whose
figures was measured is left out, and so are tables and sections without content.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_engine.config import DEFAULT_MODEL
from llama_engine.report.story import STACK_NAMES, Story, roofline_points, waterfall_steps

TEMPLATE = Path(__file__).with_name("report.md.j2")
README_MARKS = ("<!-- results:begin -->", "<!-- results:end -->")
NONE = "not measured"
CONVERSIONS = {
    "M": lambda x: x / 1e6,
    "G": lambda x: x / 1e9,
    "T": lambda x: x / 1e12,
    "i": lambda rate: 1e6 / rate,  # seconds for a million
    "k": lambda joule: joule / 3.6,  # J a token to kWh a million tokens
}
MACHINES = (
    "| machine, model | baseline tok/s | engine tok/s | MBU | speed-up, 95 % interval | TTFT ms, before → after "
    "| Triton tok/s |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)
MACHINE = (
    "| [{machine}]({link}), {model}, {date} | {base.summary.output_tokens_per_s.p50:,.1f} "
    "| {engine.summary.output_tokens_per_s.p50:,.1f}{invalid} | {engine.summary.mbu} | {speedup.latency} "
    "| {base.summary.ttft_ms.p50:,.1f} → {engine.summary.ttft_ms.p50:,.1f} | {served} |"
)
SYNTHETIC = (
    "> **Synthetic weights.** The model has the published geometry with seeded random weights: speed does not depend "
    "on the values, accuracy is not claimed."
)
SYNTHETIC_ACCURACY = (
    "Synthetic weights: perplexity and KL would mean nothing. The logits of the engine's kernels against the "
    "dequantized weights in float32 instead:"
)


class Page(string.Formatter):
    """Fills templates from one machine's results and remembers where the figures came from."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.asked = 0  # figures since a line began
        self.sources: list[str] = []
        invalid = story.invalid
        noisy = {name: x["validity"].get("cautions") for name, x in story.files.items()}
        labels = {"base": STACK_NAMES["transformers"], "engine": STACK_NAMES[story.backend]}
        labels = {x: f"{y} (INVALID)" if story.aliases[x] in invalid else y for x, y in labels.items()}
        accuracy, withheld = story.aliases["accuracy"] in story.files, story.withheld()
        versions = story.get("any", "environment.software") or {}
        reasons = "; ".join(filter(None, [story.quick_gate, *(story.get("accuracy", "gate.reasons") or [])]))
        levels = [
            {
                "file": file,
                "at": f"{file}.levels.{i}",
                "name": f"{where}, {x['concurrency']} at once{'' if story.level_valid(file, x) else ' (INVALID)'}",
            }
            for file, where in (
                ("engine", "in process"),
                ("triton", "through Triton"),
                ("whole", "through Triton, whole answers"),
            )
            for i, x in story.levels(file)
        ]
        measured = [{"at": x, "name": label} for x, label in labels.items() if story.aliases[x] in story.files]
        l3, nbytes = story.get("engine", "environment.cpu.l3_bytes"), story.get("engine", "summary.step_nbytes")
        commands = [result["environment"].get("command", "") for result in story.files.values()]
        commands = dict.fromkeys(re.sub(r" --output /\S+", "", command) for command in commands)  # a temporary file
        cited = {x: [f"{story.aliases[x]}:{key}" for key in ("cost", "summary.tpot_ms.p50")] for x in labels}
        self.lists: dict[str, list[dict[str, Any]]] = {
            "measured": measured,
            "levels": [x for x in levels if x["file"] != "whole"],
            "whole": [x for x in levels if x["file"] == "whole"],
            "loads": [*({**x, "name": f"{x['name']}, 1 at once"} for x in measured), *levels],
            "kernels": list(self._kernels()),
            "roofline": [
                {"name": name, "intensity": x, "gflops": y / 1e9, "sources": cited[file]}
                for name, x, y, file in roofline_points(story)
            ],
            "waterfall": list(self._waterfall()),
            "no_gpu": [] if story.on_gpu else [{}],
            "cached": [] if story.on_gpu or not l3 or not nbytes or nbytes >= l3 else [{}],
            "commands": [{"command": command} for command in commands if ".py" in command],
        }
        self.values = {
            "machine": story.machine,
            "invalid": "" if story.valid("engine") else " **INVALID**",
            "run_all": _run_all(story),
            "date": str(story.get("any", "environment.time_utc"))[:10],
            "model": story.any["model"]["name"] + (", **synthetic weights**" if story.synthetic else ""),
            "base_label": labels["base"],
            "engine_label": labels["engine"],
            "synthetic_note": SYNTHETIC if story.synthetic else "",
            "invalid_notes": "\n>\n".join(
                [f"> **INVALID** {name}: {'; '.join(x)}. It enters no ratio." for name, x in invalid.items()]
                + [f"> **Noisy** {name}: {'; '.join(x)}." for name, x in noisy.items() if x]
            ),
            "withheld_note": f"**No speed-up is shown:** {withheld}." if withheld else "",
            "triton_missing": ""
            if story.levels("triton")
            else "Triton Inference Server was not measured on this machine.",
            "software": ", ".join(
                f"{name} {version}" for name, version in versions.items() if version and name not in ("os", "cuda")
            ),
            "local_changes": " with local changes" if story.get("any", "environment.git.dirty") else "",
            "profile_missing": ""
            if "profile.json" in story.files
            else "No profile was taken on this machine (scripts/profile_nsight.sh).",
            "accuracy_note": (SYNTHETIC_ACCURACY if story.synthetic else "")
            if accuracy
            else "The accuracy gate was not run (benchmarks/accuracy.py).",
            "gate_reasons": f" ({reasons})" if reasons else "",
            "seconds_of": "GPU" if story.on_gpu else "machine",
            "roofline_picture": "![roofline](roofline.png)" if self.lists["roofline"] else "",
            "waterfall_picture": "![waterfall](waterfall.png)" if self.lists["waterfall"] else "",
        }

    def _kernels(self) -> Iterator[dict[str, Any]]:
        for stack, profile in (self.story.get("profile", "stacks") or {}).items():
            for i, kernel in enumerate(profile["top_kernels"][:6]):
                name = f"{STACK_NAMES[stack]}: `{kernel['name'][:70]}`"
                yield {"at": f"profile.stacks.{stack}.top_kernels.{i}", "name": name}

    def _waterfall(self) -> Iterator[dict[str, Any]]:
        steps = waterfall_steps(self.story)
        for (name, ms, file, path), before in zip(steps, [None, *steps] if len(steps) > 1 else []):
            change = f"{ms - before[1]:+.2f}" if before else ""
            sources = [f"{self.story.aliases[file]}:{path}"]
            yield {"name": " ".join(name.split()), "ms": ms, "change": change, "sources": sources}

    def fill(self, template: str, at: str = "", **values: Any) -> str:
        """The template with its fields in place; one that begins with a dot continues the path ``at``."""
        return self.vformat(template, (), {"at": at, **self.values, **values})

    def get_field(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, str]:
        if name in kwargs:
            return kwargs[name], name
        if "." not in name:
            return getattr(self, name)(), name
        file, _, path = (kwargs["at"] + name if name.startswith(".") else name).partition(".")
        return self.ratio(path) if file == "speedup" else self.figure(file, path), name

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        return CONVERSIONS[conversion](value) if conversion and value is not None else value

    def format_field(self, value: Any, spec: str) -> str:
        if value is None:
            return NONE
        return format(value, spec or (",.2f" if isinstance(value, float) else ""))

    def figure(self, file: str, path: str) -> Any:
        """A value of a result file, remembered as a source; None when it was not measured."""
        self.asked += 1
        found = self.story.get(file, path)
        if found is not None:
            self.sources.append(f"{self.story.aliases[file]}:{path}")
        return found

    def ratio(self, metric: str) -> str:
        """The speed-up with its interval and verdict; the reason in its place while it is withheld."""
        ratio = self.story.speedup(metric)
        if ratio is None:
            return "none shown" if self.story.withheld() else NONE
        self.sources.append(f"comparison.json:speedup.{metric}")
        low, high = ratio["ci95"]
        return f"**{ratio['ratio']:.2f}x** [{low:.2f}, {high:.2f}] {ratio['verdict']}"

    def served(self) -> str | None:
        """Served output tokens/s by concurrent requests."""
        rate = "{.summary.output_tokens_per_s.p50:,.0f} at {.concurrency}"
        places = [(f"triton.levels.{i}", self.story.mark("triton", level)) for i, level in self.story.levels("triton")]
        return ", ".join(self.fill(rate, at) + mark for at, mark in places) or None

    def scaling(self) -> str:
        served = [(i, level) for i, level in self.story.levels("triton") if self.story.level_valid("triton", level)]
        if len(served) < 2 or not self.story.valid("triton"):
            return ""
        (first, low), (last, high) = ((i, level["concurrency"]) for i, level in (served[0], served[-1]))
        a, b = (self.figure("triton", f"levels.{i}.summary.output_tokens_per_s.p50") for i in (first, last))
        return f"Scaling from {low} to {high} requests: {b / a:.2f}x, {b / a / (high / low):.0%} of linear."

    def lines(self, line: str) -> Iterator[str]:
        """A line of the template filled: not at all, once, or once for each item of its list."""
        repeat = re.match(r"\{\*(\w+)\}", line)
        for item in self.lists[repeat[1]] if repeat else [{}]:
            self.asked, before = 0, len(self.sources)
            filled = self.fill(line[repeat.end() :] if repeat else line, **item)
            self.sources += item.get("sources", [])
            if filled.strip() and (not self.asked or len(self.sources) > before):
                yield filled

    def __str__(self) -> str:
        """The whole report."""
        blocks: list[str] = []
        for block in TEMPLATE.read_text(encoding="utf-8").replace("BACKEND", self.story.backend).strip().split("\n\n"):
            lines = [filled for line in block.split("\n") for filled in self.lines(line)]
            if lines and blocks and lines[0].startswith("## ") and blocks[-1].startswith("## "):
                blocks.pop()  # a section without content
            if lines and not lines[-1].startswith("| ---"):  # nor a table without rows
                blocks.append("\n".join(lines))
                if self.sources:
                    blocks.append(f"<!-- sources: {', '.join(dict.fromkeys(self.sources))} -->")
            self.sources.clear()
        return "\n\n".join(blocks) + "\n"


def _run_all(story: Story) -> str:
    """The command that measures all of this."""
    name, flags = story.any["model"]["name"], f"--device {story.get('any', 'environment.device')}"
    if story.synthetic:
        flags += f" --synthetic {name.removeprefix('synthetic-')}"
    elif name.lower() != DEFAULT_MODEL:
        flags += " --model-dir DIR"
    if story.quick_gate:
        flags += " --quick"
    return f"./scripts/run_all.sh {flags} --name {story.name}"


def render(story: Story, *, headline: bool = False, others: Sequence[Story] = ()) -> str:
    """The whole report as Markdown. As ``headline`` it names its machine and gives ``others`` a section."""
    text = (f"<!-- headline: {story.name} -->\n" if headline else "") + str(Page(story))
    if others:
        pages = [Page(other) for other in others]
        rows = [page.fill(MACHINE, link=f"{page.story.name}/PERFORMANCE_REPORT.md") for page in pages]
        sources = ", ".join(f"{page.story.name}/{x}" for page in pages for x in dict.fromkeys(page.sources))
        text += "\n".join(["\n## Other machines\n", MACHINES, *rows, f"\n<!-- sources: {sources} -->\n"])
    return text


def readme_block(stories: Sequence[Story], peers: dict[str, Any] | None = None) -> str:
    """The README's results: one table over all published machines, and one against the ``peers`` of one of them."""
    rows = [Page(story).fill(MACHINE, link=f"results/{story.name}/PERFORMANCE_REPORT.md") for story in stories]
    notes = [f"No speed-up is shown for {story.name}: {reason}." for story in stories if (reason := story.withheld())]
    notes += [f"{story.name}: {story.quick_gate}." for story in stories if story.quick_gate]
    notes += [
        f"\\* INVALID on {story.name}: {name.partition(' at ')[2]} at once through Triton, {'; '.join(reasons)}."
        for story in stories
        for name, reasons in story.invalid.items()
        if name.startswith(f"{story.aliases['triton']} at ")
    ]
    against = [line for story in stories if peers and story.name == peers["machine"] for line in _peers(story, peers)]
    return "\n".join([README_MARKS[0], MACHINES, *rows, *([""] if notes else []), *notes, *against, README_MARKS[1]])


def _peers(story: Story, peers: dict[str, Any]) -> Iterator[str]:
    """A table of other engines' tokens/s and this machine's engine under them."""
    loads = ("8", "32", "64")
    yield f"\n| {story.machine} | tok/s alone | TTFT p50, ms | {' | '.join(f'{n} at once' for n in loads)} |"
    yield "| --- |" + " ---: |" * 5
    date = str(story.get("engine", "environment.time_utc") or "")[:10]
    ours = {
        "engine": f"**this engine**, INT8 weight-only, {date}" + ("" if story.valid("engine") else ", **INVALID**\\*"),
        "alone": story.get("engine", "summary.output_tokens_per_s.p50"),
        "ttft_ms": story.get("engine", "summary.ttft_ms.p50"),
    }
    for _, level in story.levels("engine"):
        rate = level["summary"]["output_tokens_per_s"]["p50"]
        ours[str(level["concurrency"])] = f"{rate:,.0f}{story.mark('engine', level)}"
    for row in (*peers["peers"], ours):
        alone = [f"{row[key]:,.1f}" if key in row else "" for key in ("alone", "ttft_ms")]
        batches = [row.get(n, "") for n in loads]
        yield f"| {' | '.join([row['engine'], *alone, *(x if isinstance(x, str) else f'{x:,}' for x in batches)])} |"
    yield f"\n{peers['note']}"
    found = {name.partition(" at ")[2]: "; ".join(why) for name, why in story.invalid.items() if "optimized" in name}
    if wrong := [f"{load} at once, {why}" if load else why for load, why in found.items()]:
        yield f"\\* INVALID in this engine's run: {'; '.join(wrong)}."


def replace_block(text: str, block: str) -> str | None:
    """``text`` with the README block between the marks replaced, or None when the marks are missing."""
    before, begin, rest = text.partition(README_MARKS[0])
    _, end, after = rest.partition(README_MARKS[1])
    return before + block + after if begin and end else None
