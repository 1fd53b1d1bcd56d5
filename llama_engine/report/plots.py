"""The pictures: each title states what was found, each value comes from a result file."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib.pyplot as plt

from llama_engine.report.drawing import (
    BASE,
    COLOURS,
    ENGINE,
    IDEAL,
    STYLE,
    TRITON,
    draw_bars,
    draw_groups,
    finish,
    short,
    stack_groups,
    stack_rows,
)
from llama_engine.report.ladder import rungs
from llama_engine.report.pareto import draw as draw_pareto
from llama_engine.report.story import Story, best_load, roofline_points, waterfall_steps


def draw_all(story: Story, folder: Path) -> list[Path]:
    """Write every picture the results allow; returns the paths. Files appear whole."""
    written = []
    for name, draw in PICTURES.items():
        with plt.rc_context(STYLE):
            figure = draw(story)
        if figure is not None:
            path, partial = folder / name, folder / f".{name}.partial"
            figure.savefig(partial, format="png", metadata={"Source-SHA256": story.sha256, "Software": None})
            plt.close(figure)
            os.replace(partial, path)
            written.append(path)
    return written


def _ratio(story: Story, metric: str, what: str, fallback: str) -> str:
    ratio = story.speedup(metric)
    if ratio is None:
        return fallback
    if ratio["verdict"] == "inconclusive":
        return f"{what}: no measurable difference"
    times = ratio["ratio"] if ratio["verdict"] == "faster" else 1 / ratio["ratio"]
    return f"{what} {times:.1f}x {ratio['verdict']}"


def _headline(story: Story) -> str:
    ratio = story.speedup("latency")
    if ratio is None:
        return "Baseline and INT8 engine, no speed-up claimed"
    if ratio["verdict"] != "faster":
        return "The INT8 engine is not faster than the baseline"
    low, high = ratio["ci95"]
    return f"INT8 generates {ratio['ratio']:.2f}x faster than the 16-bit baseline (95 % CI {low:.2f} to {high:.2f})"


def _speeds(axes: plt.Axes, story: Story, title: str) -> None:
    """Tokens per second of one request, with the engine's speed at MBU 1 as a line."""
    draw_bars(axes, stack_rows(story, "summary.output_tokens_per_s.p50"), "{:,.1f}", "tokens/s, one request", title)
    bandwidth = story.get("engine", "environment.read_bandwidth.bytes_per_s")
    if nbytes := story.get("engine", "summary.step_nbytes"):
        limit = bandwidth / nbytes
        axes.axhline(limit, color=IDEAL, linestyle="--", linewidth=1.6)
        axes.set_ylim(0, max(axes.get_ylim()[1], limit * 1.25))
        style = {"color": IDEAL, "fontsize": 10, "transform": axes.get_yaxis_transform()}
        axes.text(0.02, limit * 1.015, f"memory-bandwidth limit {limit:,.0f}", **style)


def executive_summary(story: Story) -> plt.Figure:
    """Decode, first token, served throughput: three panels."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 6.2))
    _speeds(axes[0], story, _ratio(story, "tpot", "INT8 decode", "Decode: measured, no speed-up claimed"))
    title = _ratio(story, "ttft", "First token", "Time to first token")
    draw_bars(axes[1], stack_rows(story, "summary.ttft_ms.p50"), "{:,.1f}", "TTFT p50, ms (lower is better)", title)
    served = story.throughput("triton")
    rows = [(f"{users}{mark}", rate, TRITON) for users, rate, mark in served]
    title = "Served: {1:,.0f} tok/s at {0}".format(*best_load(served)) if rows else "Served through Triton"
    draw_bars(axes[2], rows, "{:,.0f}", "tokens/s through Triton", title)
    each = story.get("triton", "workload.output_tokens")
    axes[2].set_xlabel("concurrent requests" + (f", {each} new tokens each" if each else ""))
    return finish(figure, story, _headline(story))


def performance_comparison(story: Story) -> plt.Figure | None:
    """Six panels: speed, first token, inter-token percentiles, run by run, bandwidth use, work per token."""
    if not story.stacks():
        return None
    figure, grid = plt.subplots(2, 3, figsize=(16, 9.6))
    axes = grid.ravel()
    _speeds(axes[0], story, _ratio(story, "tpot", "Each token comes", "Decode speed"))
    size = story.get("engine", "summary.prefill_ttft_ms.input_tokens")
    title = _ratio(story, "prefill", f"{size}-token prompt", "Long prompt, time to first token")
    draw_bars(
        axes[1], stack_rows(story, "summary.prefill_ttft_ms.p50"), "{:,.1f}", f"TTFT p50 of {size} tokens, ms", title
    )
    draw_groups(axes[2], stack_groups(story, "summary.itl_ms"), "ms", "Inter-token latency, pooled over tokens")
    for times, label, colour in stack_groups(story, "samples.latency_s"):
        axes[3].plot(range(1, len(times) + 1), times, "o-", color=colour, label=label)
    axes[3].set(xlabel="timed run (interleaved)", ylabel="latency, s", title="Every run, not the best")
    axes[3].set_ylim(0, axes[3].get_ylim()[1] * 1.35)
    axes[3].xaxis.get_major_locator().set_params(integer=True)
    axes[3].legend(loc="upper right")
    used = stack_rows(story, "summary.mbu", 100)
    title = f"{used[-1][1]:.0f}% of read bandwidth used" if used else "Memory bandwidth used (MBU)"
    draw_bars(axes[4], used, "{:.0f} %", "MBU, % of measured read bandwidth", title)
    launches = [
        (label, story.get("profile", f"stacks.{story.get(file, 'backend')}.launches_per_token"), COLOURS[file])
        for file, label in story.stacks()
    ]
    if all(value for _, value, _ in launches):
        draw_bars(axes[5], launches, "{:,.1f}", "CPU launches per token", f"{launches[-1][1]:,.1f} launches per token")
    else:
        rows = stack_rows(story, "summary.step_nbytes", 1e-6)
        title = f"{rows[0][1] / rows[-1][1]:.2f}x fewer bytes per token" if len(rows) > 1 else "Bytes per token"
        draw_bars(axes[5], rows, "{:,.0f}", "MB a decode step must read", title)
    return finish(figure, story, _headline(story))


def ttft_percentiles(story: Story) -> plt.Figure:
    """TTFT p50 to p99: both stacks in process and the served levels."""
    figure, axes = plt.subplots(figsize=(13, 7))
    groups = stack_groups(story, "summary.ttft_ms")
    levels = [x for _, x in story.levels("triton")]
    levels = [x for x in levels if x["concurrency"] <= 8] or levels[:4]  # more bars cannot be read
    shades = plt.get_cmap("Oranges")
    for i, x in enumerate(levels):
        shade = shades(0.4 + 0.5 * i / len(levels))
        groups.append((x["summary"].get("ttft_ms"), f"Triton, {x['concurrency']} at once", shade))
    draw_groups(axes, groups, "TTFT, ms", "Time to first token by percentile (linear interpolation)")
    return finish(figure, story, _ratio(story, "ttft", "First token: INT8 engine", "Time to first token, every stack"))


def triton_scaling(story: Story) -> plt.Figure:
    """Throughput and latency against concurrency, with the straight line from one request."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6.4))
    served = [level for _, level in story.levels("triton")]
    if not served:
        for axes, title in ((left, "Throughput"), (right, "Latency")):
            draw_bars(axes, [], "", "", title)
        return finish(figure, story, "Serving through Triton: not measured")
    x, y, marks = zip(*story.throughput("triton"))
    left.plot(x, [y[0] * n / x[0] for n in x], "--", color=IDEAL, label=f"linear from {x[0]}")
    left.plot(x, y, "o-", color=TRITON, label="through Triton", linewidth=2.5)
    if batches := story.throughput("engine"):
        left.plot(*list(zip(*batches))[:2], "s", color=ENGINE, label="in process")
    for n, rate, mark in batches:
        left.annotate(mark, (n, rate), textcoords="offset points", xytext=(0, 4), ha="center", fontweight="bold")
    for n, rate, mark in zip(x, y, marks):
        text = f"{rate:,.0f}{mark}"
        left.annotate(text, (n, rate), textcoords="offset points", xytext=(8, -14), fontweight="bold")
    users, rate, _ = best_load(list(zip(x, y, marks)))
    scaling = f"{rate / y[0]:.1f}x the throughput at {users / x[0]:g}x the load"
    left.set_title(scaling if story.valid("triton") else "Throughput (INVALID run)")
    left.set(xlabel="concurrent requests", ylabel="output tokens/s, all requests", ylim=(0, None))
    left.legend(loc="upper left")
    for key, colour, label in (("tpot_ms", TRITON, "TPOT p50"), ("ttft_ms", ENGINE, "TTFT p50")):
        points = {n: level["summary"][key]["p50"] for n, level in zip(x, served) if key in level["summary"]}
        right.plot(points.keys(), points.values(), "o-", color=colour, label=label, linewidth=2.5)
        for n, value in points.items():
            right.annotate(short(value), (n, value), textcoords="offset points", xytext=(0, 8), ha="center")
    right.set(xlabel="concurrent requests", ylabel="ms", yscale="log", title="What each user sees")
    low, high = right.get_ylim()
    right.set_ylim(low / 1.3, high * 1.6)
    right.legend(loc="upper left", ncols=2)
    if wide := x[-1] > 8 * x[0]:
        left.set_yscale("log")
        rates = [*y, *(rate for _, rate, _ in batches)]
        left.set_ylim(min(rates) / 1.6, max(rates) * 3)
    for axes in (left, right):
        if wide:
            axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(n) for n in x])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    return finish(figure, story, f"Triton serves {rate:,.0f} tokens/s at {users} concurrent requests")


def waterfall(story: Story) -> plt.Figure | None:
    """ms per output token: baseline, what the engine saves, what serving costs, all at one request."""
    steps = waterfall_steps(story)
    if len(steps) < 2:
        return None
    figure, axes = plt.subplots(figsize=(12 if len(steps) < 4 else 16, 6.6))
    bars = []  # (label, bottom, height, colour, text)
    for name, file, (ms, _), step in steps:
        if step:
            change = step.value
            label = "saved" if change < 0 else "cost"
            colour = (IDEAL if change < 0 else TRITON, 0.55)
            bars.append((label, min(ms, ms - change), abs(change), colour, f"{change:+.2f} ms"))
        bars.append((name, 0, ms, COLOURS.get(file, ENGINE), f"{ms:.2f} ms"))
    for place, (_, bottom, height, colour, text) in enumerate(bars):
        axes.bar(place, height, bottom=bottom, color=colour, width=0.6)
        axes.text(place, bottom + height, text, ha="center", va="bottom", fontweight="bold")
    axes.set_xticks(range(len(bars)), next(zip(*bars)))
    axes.set(ylabel="latency / output tokens, ms (p50)", title="One request at a time, same prompt and length")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    gain = f"From {steps[0].ms.value:.1f} to {steps[-1].ms.value:.1f} ms per token"
    return finish(figure, story, "Where the time of a token goes" if story.withheld() else gain)


def roofline(story: Story) -> plt.Figure | None:
    """FLOP/s against FLOP per byte: decode at each batch, prefill, under this machine's measured limits."""
    points = roofline_points(story)
    if not points:
        return None
    file = points[-1].file
    limits = ("matmul.flop_per_s", "read_bandwidth.bytes_per_s")
    peak, bandwidth = (story.get(file, f"environment.{limit}") for limit in limits)
    figure, axes = plt.subplots(figsize=(12, 7))
    ridge = peak / bandwidth
    reached = [point.intensity.value for point in points]
    low, high = min(reached) / 3, max(ridge, *reached) * 3
    axes.plot([low, ridge, high], [bandwidth * low, peak, peak], color="black", linewidth=2)
    axes.text(high, peak * 1.1, f"matmul {peak / 1e12:.3g} TFLOP/s", ha="right", fontsize=10)
    place = (low * ridge) ** 0.5
    axes.text(place, bandwidth * place * 1.5, f"read {bandwidth / 1e9:,.0f} GB/s", ha="right", fontsize=10)
    for number, (label, of, (intensity, _), (rate, _)) in enumerate(points, 1):
        axes.plot(intensity, rate, "o", color=COLOURS[of], markersize=9, label=f"{number}  {label}")
        axes.annotate(str(number), (intensity, rate), textcoords="offset points", xytext=(9, -4), fontsize=11)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte read (linear layers)", ylabel="FLOP/s reached")
    axes.set_title("Each point against the limits measured in the same run")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.25, which="both")
    used = story.get(file, "summary.mbu")
    return finish(figure, story, f"Decode of one request runs at {used:.0%} of the memory-bandwidth limit")


def ladder(story: Story) -> plt.Figure | None:
    """tok/s of every scheme alone and at its saturated load; pale where the accuracy gate lets it make no claim."""
    found = [rung for rung in rungs(story) if rung.measured]
    if not found:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(18, 6.6))
    for axis, title in zip(axes, ("One request at a time", "Saturated")):
        for place, rung in enumerate(found):
            at = rung.file if axis is axes[0] else rung.level
            value = story.at(f"{at}.summary.output_tokens_per_s.p50")
            style = {"color": BASE if rung.file == "base" else ENGINE}
            if not rung.passed:
                style = {"facecolor": "#eeeeee", "edgecolor": "#b0b0b0", "hatch": "//"}
            axis.bar(place, value, width=0.65, **style)
            users = f"\n{rung.users} at once" if axis is axes[1] else ""
            axis.text(place, value, f"{value:,.0f}{users}", ha="center", va="bottom", fontsize=10)
        axis.set_xticks(
            range(len(found)), [rung.shown.replace(" (", "\n(").replace(", ", ",\n") for rung in found], fontsize=10
        )
        axis.set(ylabel="output tokens/s (p50)", title=title)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.15)
    return finish(figure, story, "Speed of each precision; hatched grey failed the accuracy gate or was not put to it")


def pareto(story: Story) -> plt.Figure | None:
    """Tokens/s of a GPU, energy and price against what a user sees."""
    drawn = draw_pareto(story)
    return drawn and finish(drawn[0], story, drawn[1])


def failover(story: Story) -> plt.Figure | None:
    """Tokens a second of all users before, while and after a replica is killed."""
    seen = story.get("failover", "failover")
    if not seen:
        return None
    figure, axes = plt.subplots(figsize=(12, 6.2))
    seconds = [x["s"] for x in seen["timeline"]]
    axes.step(seconds, [x["tokens_per_s"] for x in seen["timeline"]], where="post", color=TRITON, linewidth=2)
    axes.axhline(seen["before_tokens_per_s"], color=IDEAL, linestyle="--", label="before the kill")
    axes.axvline(0, color="black", linewidth=1.2, label="kill -9 of one replica")
    for key, label in (("recovery_s", "throughput back"), ("full_strength_s", "all replicas back")):
        if seen[key] is not None and seen[key] <= seconds[-1]:
            colour = {"recovery_s": ENGINE, "full_strength_s": BASE}[key]
            axes.axvline(seen[key], color=colour, linestyle=":", linewidth=2, label=f"{label}, {seen[key]:.1f} s")
    users, replicas = (story.get("failover", f"workload.{key}") for key in ("concurrency", "replicas"))
    axes.set(xlabel="seconds since the kill", ylabel="output tokens/s, all users", ylim=(0, None))
    mark = "" if story.valid("failover") else "*"
    axes.set_title(f"{users} users of {replicas} replicas; longest gap {seen['longest_gap_s']:.2f} s{mark}")
    axes.legend(loc="lower right")
    bad = seen["lost"] + seen["duplicated"] + seen["wrong"]
    what = f"{bad} of them lost, duplicated or wrong" if bad else "none lost, none wrong"
    if seen["diverged"]:
        what += f", {seen['diverged']} diverged"
    tokens = [story.get("failover", f"workload.{key}_tokens") for key in ("input", "output")]
    asked = "prompts of {} tokens, {} new tokens, greedy and sampled".format(*tokens)
    return finish(figure, story, f"One of {replicas} replicas dies: {seen['answers']:,} answers, {what}", asked)


PICTURES = {
    f"{draw.__name__}.png": draw
    for draw in (
        *(executive_summary, performance_comparison, triton_scaling, ttft_percentiles),
        *(waterfall, roofline, ladder, pareto, failover),
    )
}
