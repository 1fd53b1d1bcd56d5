"""The pictures: each title states what was found, each value comes from a result file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama_engine.measure.generation import Cost
from llama_engine.measure.stats import PERCENTILES
from llama_engine.measure.story import STACK_NAMES, Story

BASE, ENGINE, TRITON, IDEAL = "#7f7f7f", "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's colour-blind-safe set
STYLE = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "figure.dpi": 120,
}


def draw_all(story: Story, folder: Path) -> list[Path]:
    """Write every picture the results allow; returns the paths. Files appear whole."""
    written = []
    with plt.rc_context(STYLE):
        for name, draw in PICTURES.items():
            figure = draw(story)
            if figure is None:
                continue
            path, partial = folder / name, folder / f".{name}.partial"
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(partial, format="png", metadata={"Source-SHA256": story.sha256, "Software": None})
            plt.close(figure)
            os.replace(partial, path)
            written.append(path)
    return written


def _finish(figure: Figure, story: Story, title: str) -> Figure:
    workload = story.any["workload"]
    model = story.any["model"]["name"] + (" geometry, synthetic weights" if story.synthetic else "")
    note = f"{model} on {story.machine}"
    if "input_tokens" in workload and "output_tokens" in workload:
        note += f", {workload['input_tokens']}-token prompt, {workload['output_tokens']} new tokens, greedy"
    figure.suptitle(title, x=0.02, ha="left", fontsize=17, fontweight="bold")
    figure.text(0.02, 0.012, note, fontsize=10, color="#444444")
    invalid = [name for name in story.files if not story.valid(name)]
    if invalid:
        figure.text(
            0.98, 0.012, f"INVALID: {', '.join(invalid)}", fontsize=10, color="#b00000", ha="right", weight="bold"
        )
    if story.synthetic:
        badge = {"boxstyle": "round", "facecolor": "#fff3cd", "edgecolor": "#8a6d00"}
        figure.text(0.985, 0.985, "SYNTHETIC WEIGHTS", fontsize=12, ha="right", va="top", weight="bold", bbox=badge)
        figure.text(0.5, 0.5, "synthetic weights", fontsize=54, color="#000000", alpha=0.06, rotation=20, ha="center")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def _stacks(story: Story) -> list[tuple[str, str, str]]:
    """(file, label, colour) of the in-process stacks that were measured."""
    rows = [
        (story.baseline_file, "Baseline\n(transformers, 16-bit)", BASE),
        (story.engine_file, STACK_NAMES[story.backend].replace(" INT8 ", "\nINT8 "), ENGINE),
    ]
    return [row for row in rows if row[0] in story.files]


def _bars(axes: Axes, rows: list[tuple[str, float, str]], form: str, unit: str, title: str) -> None:
    if not rows:
        _blank(axes, title)
        return
    bars = axes.bar([row[0] for row in rows], [row[1] for row in rows], color=[row[2] for row in rows], width=0.55)
    axes.bar_label(bars, [form.format(row[1]) for row in rows], padding=3, fontweight="bold")
    axes.set_ylim(0, max(row[1] for row in rows) * 1.22 or 1)
    axes.set_ylabel(unit)
    axes.set_title(title)


def _blank(axes: Axes, title: str, why: str = "not measured on this machine") -> None:
    axes.set_title(title)
    axes.axis("off")
    axes.text(0.5, 0.5, why, ha="center", va="center", color="#666666", transform=axes.transAxes)


def _rows(story: Story, path: str, factor: float = 1.0) -> list[tuple[str, float, str]]:
    values = [(label, story.get(file, path), colour) for file, label, colour in _stacks(story)]
    return [(label, value * factor, colour) for label, value, colour in values if value is not None]


def _short(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(story: Story, metric: str, what: str, fallback: str) -> str:
    ratio = story.speedup(metric)
    if ratio is None:
        return fallback
    if ratio["verdict"] == "inconclusive":
        return f"{what}: no measurable difference"
    times = ratio["ratio"] if ratio["verdict"] == "faster" else 1 / ratio["ratio"]
    return f"{what} {times:.1f}x {ratio['verdict']}"


def _wall(axes: Axes, story: Story) -> None:
    """The engine's speed at MBU 1, as a line."""
    bandwidth = story.get(story.engine_file, "environment.read_bandwidth.bytes_per_s")
    nbytes = story.get(story.engine_file, "summary.step_nbytes")
    if not (bandwidth and nbytes):
        return
    wall = bandwidth / nbytes
    axes.axhline(wall, color=IDEAL, linestyle="--", linewidth=1.6)
    axes.set_ylim(0, max(axes.get_ylim()[1], wall * 1.25))
    place = axes.get_yaxis_transform()
    axes.text(
        0.02, wall * 1.015, f"read-bandwidth wall {wall:,.0f}", color=IDEAL, va="bottom", fontsize=10, transform=place
    )


def executive_summary(story: Story) -> Figure | None:
    """Decode, first token, served throughput: three panels."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 6.2))
    title = _ratio(story, "tpot", "INT8 decode", "Decode: measured, no speed-up claimed")
    _bars(axes[0], _rows(story, "summary.output_tokens_per_s.p50"), "{:,.1f}", "tokens/s, one request", title)
    _wall(axes[0], story)
    title = _ratio(story, "ttft", "First token", "Time to first token")
    _bars(axes[1], _rows(story, "summary.ttft_ms.p50"), "{:,.1f}", "TTFT p50, ms (lower is better)", title)
    levels = story.levels(story.triton_file)
    rows = [(str(x["concurrency"]), x["summary"]["output_tokens_per_s"]["p50"], TRITON) for _, x in levels]
    if rows:
        _bars(axes[2], rows, "{:,.0f}", "tokens/s through Triton", f"Served: {rows[-1][1]:,.0f} tok/s at {rows[-1][0]}")
        each = story.get(story.triton_file, "workload.output_tokens")
        axes[2].set_xlabel("concurrent requests" + (f", {each} new tokens each" if each else ""))
    else:
        _blank(axes[2], "Served through Triton")
    withheld = story.withheld()
    headline = "Baseline and INT8 engine, no speed-up claimed" if withheld else _headline(story)
    return _finish(figure, story, headline)


def _headline(story: Story) -> str:
    ratio = story.speedup("latency")
    if ratio is None or ratio["verdict"] != "faster":
        return "The INT8 engine is not faster than the baseline" if ratio else "Baseline and INT8 engine"
    low, high = ratio["ci95"]
    return f"INT8 generates {ratio['ratio']:.2f}x faster than the 16-bit baseline (95 % CI {low:.2f} to {high:.2f})"


def performance_comparison(story: Story) -> Figure | None:
    """Six panels: speed, first token, inter-token percentiles, run by run, bandwidth use, work a token."""
    if not _stacks(story):
        return None
    figure, grid = plt.subplots(2, 3, figsize=(16, 9.6))
    axes = grid.ravel()
    tpot = _ratio(story, "tpot", "Each token comes", "Decode speed")
    _bars(axes[0], _rows(story, "summary.output_tokens_per_s.p50"), "{:,.1f}", "tokens/s, one request", tpot)
    _wall(axes[0], story)
    prefill = _rows(story, "summary.prefill_ttft_ms.p50")
    size = story.get(story.engine_file, "summary.prefill_ttft_ms.input_tokens")
    title = _ratio(story, "prefill", f"{size}-token prompt", "Long prompt, time to first token")
    if prefill:
        _bars(axes[1], prefill, "{:,.1f}", f"TTFT p50 of {size} tokens, ms", title)
    else:
        _bars(axes[1], _rows(story, "summary.ttft_ms.p50"), "{:,.1f}", "TTFT p50, ms", "Time to first token")
    _grouped(axes[2], story, "itl_ms", "Inter-token latency, pooled over tokens", "ms")
    for file, label, colour in _stacks(story):
        times = story.get(file, "samples.latency_s") or []
        axes[3].plot(range(1, len(times) + 1), times, "o-", color=colour, label=label.replace("\n", " "))
    axes[3].set(xlabel="timed run (interleaved)", ylabel="latency, s", title="Every run, not the best")
    axes[3].set_ylim(0, axes[3].get_ylim()[1] * 1.35)
    axes[3].xaxis.get_major_locator().set_params(integer=True)
    axes[3].legend(frameon=False, loc="upper right", fontsize=10)
    used = [story.get(file, "summary.mbu") for file, _, _ in _stacks(story)]
    title = f"{used[-1]:.0%} of read bandwidth used" if used and used[-1] else "Memory bandwidth used (MBU)"
    _bars(axes[4], _rows(story, "summary.mbu", 100), "{:.0f} %", "MBU, % of measured read bandwidth", title)
    _work(axes[5], story)
    return _finish(
        figure, story, _headline(story) if not story.withheld() else "Baseline and INT8 engine, no speed-up claimed"
    )


def _work(axes: Axes, story: Story) -> None:
    """Launches a token from the profile, or GPU utilization, or bytes read a token: the first that was measured."""
    launches = [
        (label, story.get("profile.json", f"stacks.{stack}.launches_per_token"), colour)
        for (_, label, colour), stack in zip(_stacks(story), ("transformers", story.backend))
    ]
    rows = [(label, value, colour) for label, value, colour in launches if value]
    if rows:
        _bars(axes, rows, "{:,.1f}", "CPU launches a token", f"{rows[-1][1]:,.1f} launches a token")
    elif rows := _rows(story, "summary.gpu_utilization_pct.mean"):
        _bars(axes, rows, "{:.0f} %", "GPU utilization, %", f"GPU busy {rows[-1][1]:.0f} % of the time")
    else:
        rows = _rows(story, "summary.step_nbytes", 1e-6)
        title = f"{rows[0][1] / rows[-1][1]:.2f}x fewer bytes a token" if len(rows) > 1 else "Bytes a token"
        _bars(axes, rows, "{:,.0f}", "MB a decode step must read", title)


def _grouped(axes: Axes, story: Story, metric: str, title: str, unit: str, extra: list[Any] | None = None) -> None:
    groups = [(story.get(file, f"summary.{metric}"), label, colour) for file, label, colour in _stacks(story)]
    groups = [group for group in [*groups, *(extra or [])] if group[0]]
    width = 0.8 / max(1, len(groups))
    for index, (values, label, colour) in enumerate(groups):
        places = [i - 0.4 + width * (index + 0.5) for i in range(len(PERCENTILES))]
        bars = axes.bar(
            places, [values[f"p{q}"] for q in PERCENTILES], width * 0.92, color=colour, label=label.replace("\n", " ")
        )
        axes.bar_label(bars, fmt=_short, fontsize=10 if len(groups) <= 3 else 8, padding=2)
    axes.set_xticks(range(len(PERCENTILES)), [f"p{q}" for q in PERCENTILES])
    axes.set(ylabel=unit, title=title)
    if groups:
        axes.set_ylim(0, max(group[0][f"p{q}"] for group in groups for q in PERCENTILES) * 1.3)
        axes.legend(frameon=False, loc="upper left", fontsize=10, ncols=3 if len(groups) > 3 else 1)


def ttft_percentiles(story: Story) -> Figure | None:
    """TTFT p50 to p99: both stacks in process and the served levels."""
    figure, axes = plt.subplots(figsize=(13, 7))
    shades = plt.get_cmap("Oranges")
    levels = story.levels(story.triton_file)
    levels = [item for item in levels if item[1]["concurrency"] <= 8] or levels[:4]  # more bars cannot be read
    extra = [
        (
            level["summary"].get("ttft_ms"),
            f"Triton, {level['concurrency']} at once",
            shades(0.4 + 0.5 * i / max(1, len(levels))),
        )
        for i, (_, level) in enumerate(levels)
    ]
    if not _stacks(story) and not extra:
        return None
    _grouped(axes, story, "ttft_ms", "Time to first token by percentile (linear interpolation)", "TTFT, ms", extra)
    return _finish(figure, story, _ratio(story, "ttft", "First token: INT8 engine", "Time to first token, every stack"))


def triton_scaling(story: Story) -> Figure | None:
    """Throughput and latency against concurrency, with the straight line from one request."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6.4))
    served, inside = story.levels(story.triton_file), story.levels(story.engine_file)
    if not served:
        for axes, title in ((left, "Throughput"), (right, "Latency")):
            _blank(axes, title, "Triton was not run on this machine")
        return _finish(figure, story, "Serving through Triton: not measured")
    x = [level["concurrency"] for _, level in served]
    y = [level["summary"]["output_tokens_per_s"]["p50"] for _, level in served]
    left.plot(x, [y[0] * n / x[0] for n in x], "--", color=IDEAL, label=f"linear from {x[0]}")
    left.plot(x, y, "o-", color=TRITON, label="through Triton", linewidth=2.5)
    if inside:
        xs = [level["concurrency"] for _, level in inside]
        left.plot(
            xs,
            [level["summary"]["output_tokens_per_s"]["p50"] for _, level in inside],
            "s",
            color=ENGINE,
            label="in process",
        )
    for a, b in zip(x, y):
        left.annotate(f"{b:,.0f}", (a, b), textcoords="offset points", xytext=(8, -14), fontweight="bold")
    left.set(xlabel="concurrent requests", ylabel="output tokens/s, all requests", ylim=(0, None))
    scaling = f"{y[-1] / y[0]:.1f}x the throughput at {x[-1] / x[0]:g}x the load"
    left.set_title(scaling if story.valid(story.triton_file) else "Throughput (INVALID run)")
    left.legend(frameon=False, loc="upper left")
    for key, colour, label in (("tpot_ms", TRITON, "TPOT p50"), ("ttft_ms", ENGINE, "TTFT p50")):
        points = [(n, level["summary"][key]["p50"]) for n, (_, level) in zip(x, served) if key in level["summary"]]
        if points:
            right.plot(*zip(*points), "o-", color=colour, label=label, linewidth=2.5)
            for n, value in points:
                right.annotate(_short(value), (n, value), textcoords="offset points", xytext=(0, 8), ha="center")
    right.set(xlabel="concurrent requests", ylabel="ms", yscale="log", title="What each user sees")
    low, high = right.get_ylim()
    right.set_ylim(low / 1.3, high * 1.6)
    right.legend(frameon=False, loc="upper left", ncols=2)
    for axes in (left, right):
        if x[-1] > 8 * x[0]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(n) for n in x])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    if x[-1] > 8 * x[0]:
        left.set_yscale("log")
        shown = [*y, *(level["summary"]["output_tokens_per_s"]["p50"] for _, level in inside)]
        left.set_ylim(min(shown) / 1.6, max(shown) * 3)
    return _finish(figure, story, f"Triton serves {y[-1]:,.0f} tokens/s at {x[-1]} concurrent requests")


def waterfall(story: Story) -> Figure | None:
    """ms an output token: baseline, what the engine saves, what serving costs, all at one request."""
    steps = waterfall_steps(story)
    if len(steps) < 2:
        return None
    figure, axes = plt.subplots(figsize=(12, 6.6))
    labels, previous = [], None
    for name, value, _, colour in steps:
        if previous is not None:
            change = value - previous
            axes.bar(len(labels), change, bottom=previous, color=IDEAL if change < 0 else TRITON, alpha=0.55, width=0.6)
            axes.text(
                len(labels), max(value, previous), f"{change:+.2f} ms", ha="center", va="bottom", fontweight="bold"
            )
            what = "serving" if "Triton" in name else "engine"
            labels.append(f"{what} {'saves' if change < 0 else 'costs'}")
        bar = axes.bar(len(labels), value, color=colour, width=0.6)
        axes.bar_label(bar, [f"{value:.2f} ms"], padding=3, fontweight="bold")
        labels.append(name)
        previous = value
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel="latency / output tokens, ms (p50)", title="One request at a time, same prompt and length")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    first, last = steps[0][1], steps[-1][1]
    title = "Where the time of a token goes" if story.withheld() else f"From {first:.1f} to {last:.1f} ms a token"
    return _finish(figure, story, title)


def waterfall_steps(story: Story) -> list[tuple[str, float, str, str]]:
    """(name, latency p50 / tokens in ms, source key, colour); Triton only where its workload is the same."""
    steps = []
    for file, label, colour in _stacks(story):
        seconds, tokens = story.get(file, "summary.latency_s.p50"), story.get(file, "workload.output_tokens")
        if seconds and tokens and story.valid(file):
            steps.append((label, seconds / tokens * 1e3, f"{file} summary.latency_s.p50", colour))
    one = [(i, level) for i, level in story.levels(story.triton_file) if level["concurrency"] == 1]
    same = all(
        story.get(story.triton_file, f"workload.{key}") == story.get(story.engine_file, f"workload.{key}")
        for key in ("input_tokens", "output_tokens")
    )
    if one and same and story.valid(story.triton_file) and "latency_s" in one[0][1]["summary"]:
        index, level = one[0]
        value = level["summary"]["latency_s"]["p50"] / story.get(story.triton_file, "workload.output_tokens") * 1e3
        key = f"{story.triton_file} levels.{index}.summary.latency_s.p50"
        steps.append(("through Triton", value, key, TRITON))
    return steps


def roofline(story: Story) -> Figure | None:
    """FLOP/s against FLOP a byte: decode at each batch, prefill, under this machine's measured walls."""
    file = story.engine_file if story.engine_file in story.files else story.baseline_file
    peak = story.get(file, "environment.matmul.flop_per_s")
    bandwidth = story.get(file, "environment.read_bandwidth.bytes_per_s")
    points = roofline_points(story)
    if not (peak and bandwidth and points):
        return None
    figure, axes = plt.subplots(figsize=(12, 7))
    low = min(point[1] for point in points) / 3
    high = max(max(point[1] for point in points), peak / bandwidth) * 3
    xs = [low, peak / bandwidth, high]
    axes.plot(xs, [min(peak, bandwidth * x) for x in xs], color="black", linewidth=2)
    axes.text(high, peak * 1.1, f"16-bit matmul {peak / 1e12:.3g} TFLOP/s", ha="right", fontsize=10)
    place = (low * peak / bandwidth) ** 0.5
    axes.text(place, bandwidth * place * 1.5, f"read {bandwidth / 1e9:,.0f} GB/s", ha="right", fontsize=10)
    for index, (label, intensity, rate, colour) in enumerate(points):
        axes.plot(intensity, rate, "o", color=colour, markersize=9, label=f"{index + 1}  {label}")
        axes.annotate(str(index + 1), (intensity, rate), textcoords="offset points", xytext=(9, -4), fontsize=11)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte read (linear layers)", ylabel="FLOP/s reached")
    axes.set_title("Each point against the walls measured in the same run")
    axes.legend(frameon=False, loc="lower right", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    mbu = story.get(file, "summary.mbu")
    return _finish(figure, story, f"Decode of one request runs at {mbu:.0%} of the memory wall")


def roofline_points(story: Story) -> list[tuple[str, float, float, str]]:
    """(label, FLOP/byte, FLOP/s, colour) of decode, batches and the long prefill, from each stack's recorded cost."""
    points = []
    for file, label, colour in _stacks(story):
        name = label.replace("\n", " ")
        cost, summary = Cost(**story.get(file, "cost")), story.get(file, "summary")
        shape = [story.get(file, f"workload.{key}") for key in ("input_tokens", "output_tokens")]
        flop = cost.flop_per_token
        rate = flop / (summary["tpot_ms"]["p50"] / 1e3)
        points.append((f"{name}: decode", flop / cost.decode_nbytes(*shape), rate, colour))
        for _, level in story.levels(file):
            n, step = level["concurrency"], level["summary"]["tpot_ms"]["p50"] / 1e3
            shape = [level["workload"][key] for key in ("input_tokens", "output_tokens")]
            intensity = n * flop / cost.decode_nbytes(*shape, n)
            points.append((f"{name}: decode, {n} at once", intensity, n * flop / step, colour))
        if long := summary.get("prefill_ttft_ms"):
            work = flop * long["input_tokens"]
            intensity = work / cost.decode_nbytes(0, 2 * long["input_tokens"])
            points.append((f"{name}: prefill {long['input_tokens']}", intensity, work / (long["p50"] / 1e3), colour))
    return points


PICTURES: dict[str, Callable[[Story], Figure | None]] = {
    "executive_summary.png": executive_summary,
    "performance_comparison.png": performance_comparison,
    "triton_scaling.png": triton_scaling,
    "ttft_percentiles.png": ttft_percentiles,
    "waterfall.png": waterfall,
    "roofline.png": roofline,
}
