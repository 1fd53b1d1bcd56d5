"""What aiperf, GuideLLM and ``vllm bench serve`` wrote, as a result of ours: metrics computed again from their records
by docs/METRICS.md, judged by our rules; each level's cautions name the rules for which its file holds no fields.

Written against aiperf 0.13, GuideLLM 0.8 (report version 2) and vLLM 0.11 to 0.25.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_engine.errors import InputError
from llama_engine.measure.result import Result, dig, new_result
from llama_engine.measure.stats import percentile, summary
from llama_engine.measure.validity import unapplied

AIPERF_RECORDS, AIPERF_SUMMARY = "profile_export.jsonl", "profile_export_aiperf.json"


class Ours(InputError):
    """The file is a result of ours."""


@dataclass
class Request:
    """One answered request; seconds. ``start`` is t0 on the tool's clock, None where it kept none."""

    start: float | None
    ttft_s: float | None
    latency_s: float
    input_tokens: int | None
    output_tokens: int
    gaps_s: list[float] = field(default_factory=list)  # between chunks
    lag_s: float | None = None  # from due to sent
    cached_tokens: int | None = None


@dataclass
class Load:
    """One load as a tool recorded it."""

    requests: list[Request]
    failed: int
    concurrency: int | None = None  # closed loop
    rate: float | None = None  # open loop
    asked: int | None = None  # output tokens that every request had to have
    wall_s: float | None = None  # by the tool, for want of starts
    said: dict[str, float] = field(default_factory=dict)  # the tool's own p50 of what it gives another name or formula
    summary: dict[str, Any] = field(default_factory=dict)  # where it kept no records

    def level(self) -> dict[str, Any]:
        """``samples``, ``summary`` and ``checks`` of :mod:`llama_engine.measure.validity`'s terms."""
        runs = self.requests
        part: dict[str, Any] = {"mode": "closed" if self.concurrency else "open", "samples": {}, "said": self.said}
        part |= {"concurrency": self.concurrency} if self.concurrency else {"rate": self.rate} if self.rate else {}
        part["workload"] = {"output_tokens": self.asked} if self.asked else {}
        checks: dict[str, Any] = {"failed_requests": self.failed}
        part |= {"summary": self.summary, "checks": checks}
        if not runs:
            return part
        if all(run.start is not None for run in runs):
            self.wall_s = max(run.start + run.latency_s for run in runs) - min(run.start for run in runs)
        samples: dict[str, list[Any]] = {"latency_s": [run.latency_s for run in runs]}
        if all(run.ttft_s is not None for run in runs):
            samples["ttft_ms"] = [run.ttft_s * 1e3 for run in runs]
            decode = [(run.latency_s - run.ttft_s) / max(1, run.output_tokens - 1) for run in runs]
            samples["tpot_ms"] = [seconds * 1e3 for seconds in decode]
        gaps = [gap * 1e3 for run in runs for gap in run.gaps_s]
        part["summary"] = {key: summary(values) for key, values in samples.items()}
        part["summary"] |= {"itl_ms": summary(gaps)} if gaps else {}
        tokens = [run.output_tokens for run in runs]
        part["summary"] |= {"output_tokens_per_s": summary([sum(tokens) / self.wall_s])} if self.wall_s else {}
        part["samples"] = {key: [max(0.0, x) for x in values] for key, values in samples.items()}
        part["samples"] |= {"output_tokens": tokens}
        if self.wall_s:
            checks |= {
                "requests_per_s": len(runs) / self.wall_s,
                "mean_latency_s": part["summary"]["latency_s"]["mean"],
            }
        spans = [(run.latency_s, run.ttft_s or 0.0, run.latency_s - (run.ttft_s or 0.0), *run.gaps_s) for run in runs]
        checks["clock_backwards"] = sum(min(span) < 0 for span in spans)
        if all(run.lag_s is not None for run in runs):
            checks["client_lag_p99_ms"] = percentile([run.lag_s for run in runs], 99) * 1e3
        if all(run.cached_tokens is not None for run in runs):
            checks["prefix_cache_hit_tokens"] = sum(run.cached_tokens for run in runs)
        return part


def guidellm(report: dict[str, Any]) -> Iterator[Load]:
    """A load a benchmark of the report. Its TPOT contains the TTFT and its latency ends with the stream; both are
    computed again from the times of the first and last token."""
    for benchmark in report["benchmarks"]:
        strategy, runs = benchmark["config"]["strategy"], benchmark["requests"]
        users = 1 if strategy["type_"] == "synchronous" else strategy.get("streams")
        requests, asked = [], set()
        for run in runs["successful"]:
            times, body = run["info"]["timings"], json.loads(run.get("request_args") or "{}").get("body") or {}
            due = times["request_start"] if users else times["targeted_start"]
            first, last = times["first_token_iteration"], times["last_token_iteration"] or times["request_end"]
            lag = times["request_start"] - times["targeted_start"]
            size, cached = run["output_tokens"], run["input_metrics"].get("cached_tokens")
            ttft = first - due if first else None
            requests.append(Request(due, ttft, last - due, run["prompt_tokens"], size, lag_s=lag, cached_tokens=cached))
            asked.add(body.get("max_completion_tokens") or body.get("max_tokens") if body.get("ignore_eos") else None)
        own = dig(benchmark, "metrics.time_per_output_token_ms.successful.median")
        yield Load(
            requests,
            len(runs.get("errored") or []),
            concurrency=users,
            rate=None if users else strategy.get("rate"),
            asked=asked.pop() if len(asked) == 1 else None,
            said={"time_per_output_token_ms": own} if own is not None else {},
        )


def aiperf(folder: Path) -> Iterator[Load]:
    """The one load of a run's folder. Its inter-token latency is our TPOT, its inter-chunk latency our ITL."""
    lines = (folder / AIPERF_RECORDS).read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if dig(record, "metadata.benchmark_phase") == "profiling"]
    told = (
        json.loads((folder / AIPERF_SUMMARY).read_text(encoding="utf-8")) if (folder / AIPERF_SUMMARY).is_file() else {}
    )
    phase = next((x for x in dig(told, "input_config.phases") or [] if x.get("kind") == "profiling"), {})
    users = phase.get("concurrency")
    open_loop = bool(phase.get("rate"))
    requests, failed = [], 0
    for record in records:
        about, found = record["metadata"], record["metrics"]
        values = {name: x["value"] for name, x in found.items()}
        if record.get("error") or about.get("was_cancelled") or "request_latency" not in values:
            failed += 1
            continue
        lag = (about["request_start_ns"] - about["credit_issued_ns"]) / 1e9
        late = lag if open_loop else 0.0  # in an open loop times count from when the request was due
        ttft = values.get("time_to_first_token")
        requests.append(
            Request(
                about["request_start_ns"] / 1e9 - late,
                None if ttft is None else ttft / 1e3 + late,
                values["request_latency"] / 1e3 + late,
                values.get("input_sequence_length"),
                values.get("usage_completion_tokens") or values["output_sequence_length"],
                [gap / 1e3 for gap in values.get("inter_chunk_latency", [])],
                lag,
                values.get("usage_prompt_cache_read_tokens"),
            )
        )
    osl = next((dig(x, "prompts.osl") for x in dig(told, "input_config.datasets") or []), None) or {}
    exact = dig(told, "input_config.endpoint.extra.ignore_eos") and not osl.get("stddev")
    own = dig(told, "inter_token_latency.p50")
    yield Load(
        requests,
        failed,
        concurrency=None if open_loop else users,
        rate=phase.get("rate"),
        asked=int(osl["mean"]) if exact and osl.get("mean") else None,
        said={"inter_token_latency_ms": own} if own is not None else {},
    )


def vllm(told: dict[str, Any]) -> Iterator[Load]:
    """The one load of a result. Records need ``--save-detailed``; without it the tool's own percentiles are all."""
    rate = told.get("request_rate")
    closed = rate in ("inf", None) and told.get("max_concurrency")
    load = Load(
        [],
        told.get("failed", max(0, told.get("num_prompts", 0) - told["completed"])),
        concurrency=told["max_concurrency"] if closed else None,
        rate=None if rate in ("inf", None) else float(rate),
        wall_s=told["duration"],
    )
    if "ttfts" not in told:
        for key in ("ttft_ms", "tpot_ms", "itl_ms"):
            found = {"p50": told.get(f"median_{key}"), "p99": told.get(f"p99_{key}"), "mean": told.get(f"mean_{key}")}
            load.summary |= (
                {key: {name: x for name, x in found.items() if x is not None}} if any(found.values()) else {}
            )
        load.summary["output_tokens_per_s"] = {"p50": told["output_throughput"]}
        yield load
        return
    errors = told.get("errors") or [""] * len(told["ttfts"])
    starts = told.get("start_times") or [None] * len(errors)
    columns = zip(starts, told["ttfts"], told["itls"], told["input_lens"], told["output_lens"], errors)
    for start, ttft, gaps, before, after, error in columns:
        if not error and after:
            load.requests.append(Request(start, ttft, ttft + sum(gaps), before, after, gaps))
    yield load


def read(path: Path) -> Result:
    """A tool's output as a result: a report of GuideLLM, a result of ``vllm bench serve``, or the folder of an aiperf
    run or its records. Raises :class:`InputError` for anything else, and for a file that lacks what its format has."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name in (AIPERF_RECORDS, AIPERF_SUMMARY):
        if not (folder / AIPERF_RECORDS).is_file():
            raise InputError(f"{folder} holds no {AIPERF_RECORDS}: run aiperf with its record export on")
        return _result(folder, "aiperf", lambda: aiperf(folder))
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if isinstance(told, dict) and "schema_version" in told and "validity" in told:
        raise Ours(f"{path} is a result of this repository")
    if isinstance(told, dict) and "benchmarks" in told:
        model = dig(told, "benchmarks.0.config.backend.model")
        return _result(path, "guidellm", lambda: guidellm(told), model)
    if isinstance(told, dict) and {"completed", "duration", "output_throughput"} <= told.keys():
        return _result(path, "vllm-bench", lambda: vllm(told), told.get("model_id"))
    raise InputError(f"{path} is no output of aiperf, guidellm or vllm bench serve, and no result of ours")


def _result(path: Path, tool: str, loads: Callable[[], Iterator[Load]], model: str | None = None) -> Result:
    try:
        found = list(loads())
        levels = [load.level() for load in found]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: not as {tool} writes it: {type(error).__name__}: {error}") from None
    sizes = [run.input_tokens for load in found for run in load.requests if run.input_tokens]
    lengths = {"input_tokens": sizes, "output_tokens": [run.output_tokens for load in found for run in load.requests]}
    workload: dict[str, Any] = {"tool": tool}
    for name, values in lengths.items():
        if values:
            low, high = min(values), max(values)
            workload |= {name: low} if low == high else {f"{name}_range": [low, high]}
    environment = {"cpu": {}, "gpu": None, "software": {}, "git": {}, "fingerprint": "not recorded"}
    about = {"name": model or tool, "source": "unknown", "sha256": None}
    result = new_result("served", tool, model=about, workload={}, environment=environment, levels=levels)
    result["workload"] = workload
    for level in levels:
        if missing := list(unapplied(level)):
            level["validity"]["cautions"].append(f"no fields to check: {', '.join(missing)}")
    return result
