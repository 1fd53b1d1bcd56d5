"""The loads of results as one flat table, for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_engine.files import write_text
from llama_engine.measure.result import Result, dig

STATISTICS = ("p50", "p90", "p95", "p99", "mean")
TIMES = ("ttft_ms", "tpot_ms", "itl_ms", "latency_s")
PLAIN = ("requests_per_s", "total_tokens_per_s", "energy_j_per_token", "mbu")
LOAD = ("contestant", "mode", "concurrency", "rate")
COLUMNS = (
    *("benchmark", "backend", "model", "workload", *LOAD, "sampled", "output_tokens_per_s", *PLAIN),
    *(f"{time}_{x}" for time in TIMES for x in STATISTICS),
    *("goodput_requests_per_s", "goodput_share", "failed_requests", "validity", "reasons"),
)


def rows(results: Iterable[Result]) -> Iterator[dict[str, Any]]:
    """One row a load, keyed by :data:`COLUMNS`; what was not measured is missing."""
    for result in results:
        loads = [result] if result["samples"] else []
        for load in [*loads, *result.get("levels", [])]:
            row = {name: result.get(name) for name in ("benchmark", "backend")}
            row |= {name: load.get(name) for name in LOAD}
            row["model"] = result["model"]["name"]
            row["workload"] = dig(load, "workload.traffic.name") or dig(result, "workload.traffic.name")
            row["sampled"] = "sampling" in load.get("workload", {})
            row["output_tokens_per_s"] = dig(load, "summary.output_tokens_per_s.p50")
            row |= {name: dig(load, f"summary.{name}") for name in PLAIN}
            row |= {f"{time}_{x}": dig(load, f"summary.{time}.{x}") for time in TIMES for x in STATISTICS}
            row["goodput_requests_per_s"] = dig(load, "summary.goodput.requests_per_s")
            row["goodput_share"] = dig(load, "summary.goodput.share")
            row["failed_requests"] = dig(load, "checks.failed_requests")
            row["validity"] = dig(load, "validity.status")
            row["reasons"] = "; ".join(dig(load, "validity.reasons") or [])
            yield {name: value for name, value in row.items() if value is not None}


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """Write :func:`rows` to ``path``, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(results))
    write_text(path, text.getvalue())
