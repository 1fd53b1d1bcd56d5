"""What a GPU gives against what a user sees, load by load: tokens/s, joules and dollars, each with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama_engine.measure.result import MEASUREMENTS, Result, dig
from llama_engine.measure.stats import interval
from llama_engine.report.story import STACK_NAMES, Story

Interval = tuple[float, float]
COLOURS = ("#7f7f7f", "#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
SERIES = {"baseline": "Baseline", "optimized": "in process", "triton": "through Triton"}


@dataclass(frozen=True)
class Point:
    """One load. ``per_user`` and ``per_gpu`` are output tokens/s with 95 % intervals; joules and dollars are None where
    the board's energy or the price is not known."""

    series: str
    load: str
    at: str  # file name and path, such as "triton-native.json:levels.3"
    per_user: float
    per_user_ci: Interval
    per_gpu: float
    per_gpu_ci: Interval
    valid: bool
    joules: float | None
    dollars: float | None  # per million output tokens
    dollars_ci: Interval | None


def points(story: Story) -> list[Point]:
    """Every greedy load that streamed, of every file; ``story.price_per_hour`` is what an hour of one GPU costs."""
    found = [_point(story, *load) for load in loads(story)]
    return sorted(found, key=lambda point: (point.series, point.per_gpu))


def loads(story: Story) -> Iterator[tuple[str, Result, str, dict[str, Any]]]:
    """(file name, its result, path in it, level) of what :func:`points` shows."""
    for name, result in story.files.items():
        if result["benchmark"] in MEASUREMENTS:
            for at, level in _loads(result):
                if dig(level, "summary.tpot_ms.p50") and dig(level, "summary.output_tokens_per_s.p50"):
                    yield name, result, at, level


def frontier(found: Sequence[Point]) -> list[Point]:
    """The VALID points that no other beats on both axes, by what a user sees."""
    valid = [point for point in found if point.valid]
    return sorted(
        (a for a in valid if not any(b.per_user > a.per_user and b.per_gpu > a.per_gpu for b in valid)),
        key=lambda point: point.per_user,
    )


def _loads(result: Result) -> Iterator[tuple[str, dict[str, Any]]]:
    if result["samples"]:
        yield "", result | {"concurrency": 1}
    for i, level in enumerate(result.get("levels", [])):
        if "sampling" not in level.get("workload", {}):
            yield f"levels.{i}", level


def _point(story: Story, name: str, result: Result, at: str, level: dict[str, Any]) -> Point:
    samples, summed = level.get("samples") or {}, level["summary"]
    # a server of others may use all that it sees; an engine of ours, and the baseline, use one
    gpus = dig(result, "environment.gpu.count") or 1 if result["benchmark"] == "served" else 1
    per_user, per_gpu = 1e3 / summed["tpot_ms"]["p50"], summed["output_tokens_per_s"]["p50"] / gpus
    low, high = interval(samples["tpot_ms"]) if samples.get("tpot_ms") else (summed["tpot_ms"]["p50"],) * 2
    per_gpu_ci = (per_gpu, per_gpu)
    if "concurrency" in level and len(samples.get("latency_s", [])) > 1:
        # N in flight make N / R requests a second (Little), so the mean latency's interval is that of the rate
        times = samples.get("wall_s") or samples["latency_s"]
        mean = sum(times) / len(times)
        fast, slow = interval(times, "mean")
        per_gpu_ci = (per_gpu * mean / slow, per_gpu * mean / fast)
    dollars, dollars_ci = None, None
    if story.price_per_hour:
        rate = story.price_per_hour / 3600 * 1e6
        dollars, dollars_ci = rate / per_gpu, (rate / per_gpu_ci[1], rate / per_gpu_ci[0])
    users = level.get("concurrency")
    return Point(
        SERIES.get(result["benchmark"], STACK_NAMES[result["backend"]]),
        f"{users} at once" if users else f"{level['rate']:g}/s",
        f"{name}:{at}",
        per_user,
        (1e3 / high, 1e3 / low) if low else (per_user, per_user),
        per_gpu,
        per_gpu_ci,
        story.level_valid(name, level),
        summed.get("energy_j_per_token"),
        dollars,
        dollars_ci,
    )


def draw(story: Story) -> tuple[Any, str] | None:
    """The picture, unfinished, and its title; None without a load. INVALID points are hollow."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    found = points(story)
    if not found:
        return None
    unit = "GPU" if story.on_gpu else "machine"
    panels: list[tuple[str, str]] = [("per_gpu", f"output tokens/s of one {unit}")]
    panels += [("joules", "J per output token, board")] if any(point.joules for point in found) else []
    panels += [("dollars", "$ per million output tokens")] if story.price_per_hour else []
    figure, axes = plt.subplots(1, len(panels), figsize=(12 + 5 * (len(panels) > 2), 6.4), squeeze=False)
    names = list(dict.fromkeys(point.series for point in found))
    for panel, (key, label) in zip(axes[0], panels):
        for index, name in enumerate(names):
            shown = [point for point in found if point.series == name and getattr(point, key) is not None]
            for point in shown:
                _mark(panel, point, key, index)
            panel.plot([], [], "o", color=COLOURS[index % len(COLOURS)], label=name)
        panel.set(xlabel="output tokens/s that one user sees (1 / TPOT p50)", ylabel=label, yscale="log")
        panel.grid(alpha=0.25, which="both")
        panel.margins(0.15)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    best = frontier(found)
    line = [point.per_user for point in best], [point.per_gpu for point in best]
    axes[0][0].plot(*line, "--", color="#009e73", linewidth=1.4, zorder=1, label="no load beats it on both")
    axes[0][0].legend(loc="best")
    axes[0][0].set_title("Throughput against what a user sees")
    for panel, (key, _) in zip(axes[0][1:], panels[1:]):
        panel.set_title(f"At ${story.price_per_hour:g} an hour" if key == "dollars" else "Energy")
    top = best[0] if best else found[-1]
    return figure, f"{top.per_gpu:,.0f} tokens/s a {unit} at {top.per_user:,.0f} tokens/s a user ({top.load})"


def _mark(panel: Any, point: Point, key: str, index: int) -> None:
    """One load with the intervals it has, its number beside it; hollow where it is INVALID."""
    value, around = getattr(point, key), getattr(point, f"{key}_ci", None) or (getattr(point, key),) * 2
    spans = [
        [[abs(x - low)], [abs(high - x)]] for x, (low, high) in ((point.per_user, point.per_user_ci), (value, around))
    ]
    colour = COLOURS[index % len(COLOURS)]
    face = colour if point.valid else "white"
    panel.errorbar(
        point.per_user, value, xerr=spans[0], yerr=spans[1], fmt="o", color=colour, markerfacecolor=face, capsize=2
    )
    text = point.load.removesuffix(" at once") + ("" if point.valid else "*")
    place = ((6, 6), (8, 4), (-16, -12), (8, -12))[index % 4]  # so that series side by side do not hide each other's
    panel.annotate(text, (point.per_user, value), textcoords="offset points", xytext=place, fontsize=10)
