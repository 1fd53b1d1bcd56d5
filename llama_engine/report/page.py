"""One run as a page that needs no network: Chart.js, which lies beside this file, and the run's figures are inside."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llama_engine.measure.result import dig
from llama_engine.report.pareto import COLOURS, Point, points
from llama_engine.report.story import Story

PAGE = "report.html"
HERE = Path(__file__).parent
LIBRARY = HERE / "chartjs" / "chart.umd.min.js"
METRICS = {"ttft_ms": "TTFT, ms", "tpot_ms": "TPOT, ms", "latency_s": "latency, s"}
JINJA = Environment(
    loader=PackageLoader("llama_engine.report", "."),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=True,
)


def render_page(story: Story) -> str:
    """The whole page; ``<meta name="source-sha256">`` is the hash of the results it was made from."""
    loads, unit = [_load(story, point) for point in points(story)], "GPU" if story.on_gpu else "machine"
    data = {"unit": unit, "metrics": METRICS, "colours": COLOURS, "loads": loads}
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    library = LIBRARY.read_text(encoding="utf-8").partition("//# sourceMappingURL")[0]
    inline = {"data": text, "library": library, "code": (HERE / "page.js").read_text(encoding="utf-8")}
    inline = {name: Markup(part) for name, part in inline.items()}  # trusted: ours, but for the data escaped above
    return JINJA.get_template("page.html.j2").render(story=story, unit=unit, loads=loads, **inline)


def source_of_page(text: str) -> str | None:
    """The hash of the results that a page was made from."""
    found = re.search(r'name="source-sha256" content="(\w+)"', text)
    return found and found[1]


def _load(story: Story, point: Point) -> dict[str, Any]:
    """A point with what the charts show beside it: its verdict, and each metric's 0th to 100th percentile."""
    file, _, path = point.at.partition(":")
    result = story.files[file]
    level = dig(result, path) if path else result
    samples = {key: (level.get("samples") or {}).get(key) for key in METRICS}
    quantiles = {
        key: [float(f"{x:.4g}") for x in np.percentile(values, range(101))] for key, values in samples.items() if values
    }
    verdict = level.get("validity") or result["validity"]
    shown = {key: _digits(value) for key, value in dataclasses.asdict(point).items() if key not in ("at", "valid")}
    why = [*verdict["reasons"], *verdict.get("cautions", [])]
    return shown | {"status": verdict["status"], "why": why, "quantiles": quantiles}


def _digits(value: Any) -> Any:
    """Six digits of a number, or of an interval's."""
    if isinstance(value, (tuple, list)):
        return [_digits(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
