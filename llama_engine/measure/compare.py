"""Results against each other: the interleaved pair, verdicts by today's rules, and two folders metric by metric."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llama_engine.measure.result import MEASUREMENTS, Result, dig
from llama_engine.measure.stats import bootstrap_ratio
from llama_engine.measure.validity import judge

METRICS = ("ttft_ms", "tpot_ms", "latency_s", "prefill_ttft_ms")  # times: lower is better
WORKLOAD = ("input_tokens", "output_tokens", "input_tokens_range", "output_tokens_range", "concurrency")
WORKLOAD += ("streaming", "protocol")
SAME = ("model.sha256", "summary.prefill_ttft_ms.input_tokens", *(f"workload.{name}" for name in WORKLOAD))
UNRECORDED = ("model.sha256", "workload.streaming", "workload.protocol")  # by other tools
FINGERPRINT = "environment.fingerprint"
RATIOS = {"latency": "latency_s", "ttft": "ttft_ms", "tpot": "tpot_ms", "prefill": "prefill_ttft_ms"}  # name: samples


def paired(baseline: Result, engine: Result) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ratios, verdict) of an interleaved pair: paired bootstrap ratios, none when either run is INVALID."""
    pair, speedup = (baseline, engine), {}
    reasons = [f"{r['benchmark']}: {reason}" for r in pair for reason in r["validity"]["reasons"]]
    cautions = [f"{r['benchmark']}: {x}" for r in pair for x in r["validity"].get("cautions", [])]
    if not reasons:
        before, after = baseline["samples"], engine["samples"]
        for name, key in RATIOS.items():
            if key in before and key in after:
                speedup[name] = bootstrap_ratio(before[key], after[key])
        rates = [[n / s for n, s in zip(x["output_tokens"], x["latency_s"])] for x in (after, before)]
        speedup["output_tokens_per_s"] = bootstrap_ratio(*rates)
    return speedup, {"status": "INVALID" if reasons else "VALID", "reasons": reasons, "cautions": cautions}


def judge_again(results: dict[str, Result]) -> list[str]:
    """Give a folder's results, as :func:`load_folder` returns them, the verdicts of today's rules, in place; the names
    of those that changed. What was measured stays; a pair that has become VALID gets its ratios."""
    kept = {name: copy.deepcopy(result) for name, result in results.items()}
    for result in results.values():
        if result["benchmark"] in MEASUREMENTS:
            result["validity"] = judge(result)
    for result in results.values():
        pair = [results.get(name) for name in ("baseline", f"optimized-{result['backend']}")]
        if result["benchmark"] == "comparison" and all(pair):
            ratios, result["validity"] = paired(*pair)
            result["speedup"] = ratios and (result["speedup"] or ratios)
    return [name for name in results if results[name] != kept[name]]


@dataclass(frozen=True)
class Row:
    """One metric of one load: new / old speed, its interval, and whether all of that lies below the tolerance."""

    result: str
    metric: str
    ratio: dict[str, Any]
    regressed: bool


@dataclass
class Comparison:
    """What two folders have in common; no rows where ``obstacles`` says why nothing can be compared."""

    rows: list[Row] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # loads, each with why
    foreign: bool = False  # other machines or versions, compared all the same

    @property
    def regressions(self) -> int:
        return sum(row.regressed for row in self.rows)


def compare(old: dict[str, Result], new: dict[str, Result], tolerance: float, force: bool) -> Comparison:
    """Unpaired bootstrap of the ratio of medians for each metric of each load that both folders hold.

    ``old`` and ``new`` are what :func:`load_folder` returns. A metric regressed when its whole 95 % interval is below
    1 - ``tolerance``. With ``force`` other fingerprints are compared too.
    """
    pairs = {name: (old[name], new[name]) for name in old if name in new and old[name]["benchmark"] in MEASUREMENTS}
    if obstacles := list(differences(pairs, force)):
        return Comparison(obstacles=obstacles)
    found = Comparison(foreign=any(dig(a, FINGERPRINT) != dig(b, FINGERPRINT) for a, b in pairs.values()))
    for name, pair in pairs.items():
        for load, before, after in loads(*pair):
            if obstacles := list(unlike(before, after)):
                found.left_out.append(f"{name}, {load.strip()}: {'; '.join(obstacles)}")
                continue
            for metric in METRICS:
                samples = dig(before, f"samples.{metric}"), dig(after, f"samples.{metric}")
                if all(samples):
                    ratio = bootstrap_ratio(*samples, paired=False)
                    found.rows.append(Row(name, load + metric, ratio, ratio["ci95"][1] < 1 - tolerance))
    if not found.rows:
        found.obstacles.append("no load is in both folders")
    return found


def differences(pairs: dict[str, tuple[Result, Result]], force: bool) -> Iterator[str]:
    """Why the two folders cannot be compared."""
    if not pairs:
        yield "no measurement is in both folders"
    for name, (old, new) in pairs.items():
        for obstacle in unlike(old, new):
            yield f"{name}: {obstacle}"
        if dig(old, FINGERPRINT) != dig(new, FINGERPRINT) and not force:
            yield f"{name}: other machine or library versions (--force compares them all the same, labelled)"


def unlike(old: Result, new: Result) -> Iterator[str]:
    """Why two results, or a level of each, cannot be compared."""
    for which, part in (("old", old), ("new", new)):
        if dig(part, "validity.status") == "INVALID":
            yield f"the {which} one is INVALID: {'; '.join(part['validity']['reasons'])}"
    foreign = any(dig(part, "workload.tool") for part in (old, new))
    for path in SAME:
        if dig(old, path) != dig(new, path) and not (foreign and path in UNRECORDED):
            yield f"{path} is {dig(old, path)} and {dig(new, path)}"
    schemes = [dig(x, "engine.quantization") or "W8A16" for x in (old, new)]  # older results do not say, and were INT8
    if schemes[0] != schemes[1]:
        yield f"the engines are quantized otherwise: {schemes[0]} and {schemes[1]}"
    ranks = [dig(x, "engine.config.tp_size") or 1 for x in (old, new)]
    if ranks[0] != ranks[1]:
        yield f"the engines run on {ranks[0]} and {ranks[1]} GPUs"


def loads(old: Result, new: Result) -> Iterator[tuple[str, Result, Result]]:
    """A result itself, named "", and the greedy closed-loop levels that both have, such as "8 at once "."""
    before, after = (
        {"": x}
        | {
            f"{y['concurrency']} at once ": y
            for y in x.get("levels", [])
            if "concurrency" in y and "sampling" not in y.get("workload", {})
        }
        for x in (old, new)
    )
    yield from ((name, before[name], after[name]) for name in before if name in after)
