"""What the pictures share: colours, bars, and the line below that says where and on what a figure was measured."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from llama_engine.measure.stats import PERCENTILES
from llama_engine.report.story import Story

BASE, ENGINE, TRITON, IDEAL = "#7f7f7f", "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito's colour-blind-safe set
COLOURS = {"base": BASE, "engine": ENGINE, "triton": TRITON}
STYLE = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "figure.dpi": 120,
    "legend.frameon": False,
    "legend.fontsize": 10,
}
Bar = tuple[str, float, str]  # label, value, colour
Group = tuple[dict[str, float] | None, str, str]  # percentiles, label, colour


def finish(figure: plt.Figure, story: Story, title: str, asked: str | None = None) -> plt.Figure:
    """Title, footer and marks. ``asked``: the workload in words, if not that of the latency benchmarks."""
    workload = story.any["workload"]
    note = story.any["model"]["name"] + (" geometry, synthetic weights" if story.synthetic else "")
    note += f" on {story.machine}"
    if {"input_tokens", "output_tokens"} <= set(workload):
        usual = f"{workload['input_tokens']}-token prompt, {workload['output_tokens']} new tokens, greedy"
        note += f", {asked or usual}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=17, fontweight="bold")
    figure.text(0.02, 0.032, note, fontsize=10, color="#444444")
    figure.draw_without_rendering()  # makes the labels of the ticks
    starred = any("*" in text.get_text() for text in figure.findobj(plt.Text))
    whole = [name for name in story.invalid if name in story.files]
    if whole or starred:
        names = ", ".join([*whole, *("*" if starred else "")])
        warning = f"{names} INVALID: the reasons are in the report"
        figure.text(0.02, 0.008, warning, fontsize=10, color="#b00000", weight="bold")
    if story.synthetic:
        badge = {"boxstyle": "round", "facecolor": "#fff3cd", "edgecolor": "#8a6d00"}
        figure.text(0.985, 0.985, "SYNTHETIC WEIGHTS", fontsize=12, ha="right", va="top", weight="bold", bbox=badge)
        figure.text(0.5, 0.5, "synthetic weights", fontsize=54, color="#000000", alpha=0.06, rotation=20, ha="center")
    figure.tight_layout(rect=(0, 0.055, 1, 1))
    return figure


def stack_rows(story: Story, path: str, factor: float = 1.0) -> list[Bar]:
    values = [(label, story.get(file, path), COLOURS[file]) for file, label in story.stacks()]
    return [(label, value * factor, colour) for label, value, colour in values if value is not None]


def stack_groups(story: Story, path: str) -> list[Group]:
    return [(story.get(file, path), label.replace("\n", " "), COLOURS[file]) for file, label in story.stacks()]


def draw_bars(axes: plt.Axes, rows: list[Bar], form: str, unit: str, title: str) -> None:
    """One labelled bar a row; says so where nothing was measured."""
    axes.set_title(title)
    if not rows:
        axes.axis("off")
        axes.text(0.5, 0.5, "not measured on this machine", ha="center", color="#666666", transform=axes.transAxes)
        return
    labels, values, colours = zip(*rows)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # so that no line crosses a figure
    bars = axes.bar(labels, values, color=colours, width=0.55)
    axes.bar_label(bars, fmt=form, padding=3, fontweight="bold", bbox=behind, zorder=5)
    axes.set(ylim=(0, max(values) * 1.22 or 1), ylabel=unit)


def draw_groups(axes: plt.Axes, groups: list[Group], unit: str, title: str) -> None:
    """Bars of p50 to p99 of each (statistics, label, colour) that was measured."""
    groups = [group for group in groups if group[0]]
    width = 0.8 / max(1, len(groups))
    for index, (values, label, colour) in enumerate(groups):
        places = [i - 0.4 + width * (index + 0.5) for i in range(len(PERCENTILES))]
        bars = axes.bar(places, [values[f"p{q}"] for q in PERCENTILES], width * 0.92, color=colour, label=label)
        axes.bar_label(bars, fmt=short, fontsize=10 if len(groups) <= 3 else 8, padding=2)
    axes.set_xticks(range(len(PERCENTILES)), [f"p{q}" for q in PERCENTILES])
    axes.set(ylabel=unit, title=title)
    if groups:
        axes.set_ylim(0, max(values["p99"] for values, _, _ in groups) * 1.3)
        axes.legend(loc="upper left", ncols=3 if len(groups) > 3 else 1)


def short(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
