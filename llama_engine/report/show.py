"""Results as a table on the terminal: every speed with its MBU and its limit by memory bandwidth."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_engine.measure.result import MEASUREMENTS, Result

RATE = "output_tokens_per_s"
COLUMNS = ("tok/s", "TTFT p50/p99 ms", "TPOT p50/p99 ms", "MBU", "limit", "failed")
CONDITIONS = {
    "again": "asked again alone",
    "batch": "{concurrency} at once",
    "joining": "{concurrency} at once, one joining every four steps",
    "preempted": "after preemption",
    "prefix": "prefix hit, the same prompt",
    "next_turn": "prefix hit, on its own answer",
}


def show(results: Collection[Result]) -> None:
    """One row a load of each measurement; then what is INVALID or failed, long prompts, the gate and paired ratios."""
    measured = [x for x in results if x["benchmark"] in MEASUREMENTS]
    names = (x["model"]["name"] + ", synthetic weights" * (x["model"]["source"] == "synthetic") for x in measured)
    title = "; ".join(dict.fromkeys(names))
    table = Table("", title=title, title_justify="left", box=None, collapse_padding=True, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for result in measured:
        alone = [result | {"concurrency": 1}] if result["samples"] else []
        for load in [*alone, *result.get("levels", [])]:
            users = load.get("concurrency")
            name = "engine" if result["benchmark"] == "optimized" else result["benchmark"]
            waits = result["workload"].get("streaming") is False
            what = f"{users} {'no stream' if waits else 'at once'}" if users else f"{load['rate']:g}/s"
            what += ", sampled" * ("sampling" in load.get("workload", {}))
            table.add_row(f"{name}, {what}", *_cells(load["summary"], users), str(load["checks"]["failed_requests"]))
    out = Console()
    if measured:
        out.print(table)
    for result in results:
        if result["benchmark"] == "determinism":
            _show_determinism(out, result)
        if result["benchmark"] == "failover":
            _show_failover(out, result)
    for result in results:
        name, summed = f"{result['benchmark']} ({result['backend']})", result["summary"]
        for message in result["validity"]["reasons"]:
            out.print(f"INVALID {name}: {message}", markup=False)
        for message in result["validity"].get("cautions", []):
            out.print(f"caution {name}: {message}", markup=False)
        for level in result.get("levels", []):
            for word, key in (("INVALID", "reasons"), ("caution", "cautions")):
                for message in level.get("validity", {}).get(key, []):  # levels of older files have none
                    at = level.get("concurrency", level.get("rate"))
                    out.print(f"{word} {name} at {at}: {message}", markup=False)
            for message, count in level.get("failures", {}).items():
                out.print(f"{count} x {message}", markup=False)
        if prefill := summed.get("prefill_ttft_ms"):
            shown = f"{prefill['p50']:.1f} ms, MFU {summed['prefill_mfu']:.2f}"
            out.print(f"{name}: TTFT of {prefill['input_tokens']} tokens {shown}")
        if gate := result.get("gate"):
            quick = " (--quick)" if gate.get("quick") else ""
            out.print(f"{name}: gate {gate['status']}, {summed['tokens']:,} tokens scored{quick}", markup=False)
    for result in results:
        for name, ratio in result.get("speedup", {}).items():
            low, high = ratio["ci95"]
            out.print(
                f"{name:<20} {ratio['ratio']:.2f}x  95 % [{low:.2f}, {high:.2f}]  {ratio['verdict']}", markup=False
            )


def show_foreign(result: Result) -> None:
    """Another tool's loads: each metric under docs/METRICS.md, what the tool itself said, and the verdict."""
    out, tool = Console(width=110), result["workload"]["tool"]
    table = Table(f"{tool}: load", "metric", "p50", "p99", "the tool's own p50", box=None, pad_edge=False)
    for level in result["levels"]:
        load = f"{level['concurrency']} at once" if "concurrency" in level else f"{level.get('rate', '?')}/s"
        for key, values in level["summary"].items():
            name, own = next(iter(level["said"].items()), ("", 0.0)) if key == "tpot_ms" else ("", 0.0)
            cells = (f"{values[q]:,.2f}" if q in values else "" for q in ("p50", "p99"))
            table.add_row(load, key, *cells, f"{name} {own:,.2f}" if name else "")
    out.print(table)
    for level in result["levels"]:
        verdict = level["validity"]
        why = "; ".join(verdict["reasons"]) or "by the rules that could be applied"
        out.print(f"{verdict['status']}: {why}", markup=False)
        for message in verdict["cautions"]:
            out.print(f"caution: {message}", markup=False)


def _show_determinism(out: Console, result: Result) -> None:
    """How many answers changed under each condition, and what invariance costs."""
    table = Table("answers that change", "kernels", "changed", "of", "tok/s", box=None, pad_edge=False)
    for variant in result["variants"]:
        for x in variant["conditions"]:
            cells = (str(x["changed"]), str(x["compared"]), f"{x['output_tokens_per_s']:,.1f}")
            table.add_row(CONDITIONS[x["kind"]].format(**x), variant["asked"], *cells)
    out.print(table)
    price = result["price"]
    out.print(f"price of batch invariance for kernels {price['of']}: {price['status']}", markup=False)
    for load in price["loads"]:
        if "ratio" in load:
            low, high = load["ci95"]
            what = f"{price['of']} over {load['invariant']}, {load['concurrency']} at once"
            out.print(f"{what}: {load['ratio']:.3f}x  95 % [{low:.3f}, {high:.3f}]", markup=False)


def _show_failover(out: Console, result: Result) -> None:
    """What became of the answers, and of throughput, when a replica was killed."""
    seen, scaling = result["failover"], result["scaling"]
    back = {
        name: "not within the run" if seen[name] is None else f"after {seen[name]:.1f} s"
        for name in ("recovery_s", "full_strength_s")
    }
    for line in (
        f"{seen['answers']} answers: {seen['lost']} lost, {seen['duplicated']} duplicated, {seen['wrong']} wrong, "
        f"{seen['diverged']} diverged; {seen['moved']} moved, {seen['resumed']} of them in mid-answer",
        f"longest gap {seen['longest_gap_s']:.2f} s (before the kill {seen['usual_gap_s']:.2f} s)",
        f"{seen['before_tokens_per_s']:,.0f} tok/s, at the lowest {seen['lowest_tokens_per_s']:,.0f}; throughput back "
        f"{back['recovery_s']}, all replicas {back['full_strength_s']}",
        *(
            f"{x['concurrency']} users a replica: "
            + (f"one {x['one_tokens_per_s']:,.0f} tok/s, " if "ratio" in x else "")
            + f"all {result['workload']['replicas']} {x['all_tokens_per_s']:,.0f}"
            + (f" tok/s, {x['ratio']:.2f}x" if "ratio" in x else " tok/s")
            + (f"; a gateway busy {x['all_gateway_cores']:.2f} of a core" if "all_gateway_cores" in x else "")
            for x in scaling
        ),
        *(f"failed {count} times: {message}" for message, count in result.get("failures", {}).items()),
    ):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _cells(summed: dict[str, Any], users: int | None) -> tuple[str, ...]:
    def cell(key: str, form: str) -> str:
        return form.format(**summed[key]) if key in summed else ""

    mbu = summed.get("mbu")
    # the speed at MBU 1 is users / (bytes per step / bandwidth), and bytes / bandwidth is MBU x the step's time
    limit = f"{users / (mbu * summed['tpot_ms']['p50'] / 1e3):,.0f}" if users and mbu else ""
    times = (cell("ttft_ms", "{p50:.1f} / {p99:.1f}"), cell("tpot_ms", "{p50:.2f} / {p99:.2f}"))
    return cell("output_tokens_per_s", "{p50:,.1f}"), *times, f"{mbu:.2f}" if mbu else "", limit


def show_tournament(result: Result) -> None:
    """A row a contestant and load, with its ratio over the first contestant; then what is INVALID."""
    rows = {(x["contestant"], x["workload"], x["concurrency"]): x for x in result["ratios"] if x["metric"] == RATE}
    table = Table("workload", "at once", "engine", title=result["model"]["name"], title_justify="left", box=None)
    for column in ("tok/s", "TTFT p50 ms", "TPOT p50 ms", f"tok/s over {result['contestants'][0]['name']}", ""):
        table.add_column(column, justify="right")
    out = Console()
    for level in result["levels"]:
        at, summed = (level["workload"]["traffic"]["name"], level["concurrency"]), level["summary"]
        cells = [f"{summed[key]['p50']:,.1f}" if key in summed else "" for key in (RATE, "ttft_ms", "tpot_ms")]
        if ratio := rows.get((level["contestant"], *at)):
            low, high = ratio["ci95"]
            cells += [f"{ratio['ratio']:.2f} [{low:.2f}, {high:.2f}]", ratio["verdict"]]
        table.add_row(at[0], str(at[1]), level["contestant"], *cells)
    out.print(table)
    for who in result["contestants"]:
        if "failed" in who:
            out.print(f"{who['name']} left: {who['failed']}", markup=False)
    for level in result["levels"]:
        where = f"{level['contestant']}, {level['workload']['traffic']['name']} at {level['concurrency']}"
        for message in level["validity"]["reasons"]:
            out.print(f"INVALID {where}: {message}", markup=False)
        for message, count in level["failures"].items():
            out.print(f"{count} x {message} ({where})", markup=False)
