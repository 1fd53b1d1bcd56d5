"""PERFORMANCE_REPORT.md and the README's table, from the JSON alone. Every figure names its file and key in a comment."""

# ruff: noqa: E501 - a table's row stays one line, so that it can be read as the row it prints

from __future__ import annotations

import re
from collections.abc import Sequence

from llama_engine.measure.environment import LIBRARIES
from llama_engine.measure.plots import PICTURES, roofline_points, waterfall_steps
from llama_engine.measure.stats import PERCENTILES
from llama_engine.measure.story import STACK_NAMES, Story

README_MARKS = ("<!-- results:begin -->", "<!-- results:end -->")
NONE = "not measured"


class Page:
    """Markdown under construction. ``value`` formats a number and remembers where it came from."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self._lines: list[str] = []
        self._sources: list[str] = []

    def value(self, file: str, path: str, form: str = "{:,.2f}", factor: float = 1.0) -> str:
        found = self.story.get(file, path)
        if found is None or isinstance(found, (dict, list)):
            return NONE
        self._sources.append(f"{file}:{path}")
        return form.format(found * factor if isinstance(found, (int, float)) and factor != 1 else found)

    def ratio(self, metric: str) -> str:
        """The speed-up with its interval and verdict; the reason in its place while it is withheld."""
        ratio = self.story.speedup(metric)
        if ratio is None:
            return "none shown" if self.story.withheld() else NONE
        self._sources.append(f"comparison.json:speedup.{metric}")
        low, high = ratio["ci95"]
        return f"**{ratio['ratio']:.2f}x** [{low:.2f}, {high:.2f}] {ratio['verdict']}"

    def text(self, *lines: str) -> None:
        self._lines += [*lines, ""]
        if self._sources:
            self._lines += [f"<!-- sources: {', '.join(dict.fromkeys(self._sources))} -->", ""]
            self._sources.clear()

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> None:
        lines = [f"| {' | '.join(head)} |", f"| --- |{f' {align} |' * (len(head) - 1)}"]
        self.text(*lines, *(f"| {' | '.join(row)} |" for row in rows))

    def __str__(self) -> str:
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self._lines)).rstrip() + "\n"


def render(story: Story, *, headline: bool = False, others: Sequence[Story] = ()) -> str:
    """The whole report as Markdown. As ``headline`` it names its machine and gives ``others`` a section."""
    page = Page(story)
    marker = f"<!-- headline: {story.name} -->\n" if headline else ""
    page.text(f"# Performance on {story.machine}")
    if story.synthetic:
        page.text(
            "> **Synthetic weights.** The model has the published geometry with seeded random weights: speed does not "
            "depend on the values, accuracy is not claimed."
        )
    for name, result in story.files.items():
        if result["validity"]["status"] != "VALID":
            page.text(f"> **INVALID** {name}: " + "; ".join(result["validity"]["reasons"]) + ". No ratio is computed.")
    _summary(page, story)
    for section in (_setup, _method, _latency, _throughput, _time, _accuracy, _cost, _waterfall, _limits, _reproduce):
        section(page, story)
    if others:
        _others(page, others)
    return marker + str(page)


def _files(story: Story) -> list[str]:
    return [file for file in (story.baseline_file, story.engine_file) if file in story.files]


def _label(story: Story, file: str) -> str:
    label = STACK_NAMES.get(story.get(file, "backend"), file)
    return label if story.valid(file) else f"{label} (INVALID)"


def _summary(page: Page, story: Story) -> None:
    page.text("## Summary")
    page.table(("one request", *(_label(story, file) for file in _files(story)), "speed-up, 95 % interval"), [
        ("output tokens/s, p50", *(page.value(f, "summary.output_tokens_per_s.p50", "{:,.1f}") for f in _files(story)), page.ratio("output_tokens_per_s")),
        ("MBU", *(page.value(f, "summary.mbu") for f in _files(story)), ""),
        ("decode: TPOT p50, ms", *(page.value(f, "summary.tpot_ms.p50") for f in _files(story)), page.ratio("tpot")),
        ("prefill: TTFT p50, ms", *(page.value(f, "summary.ttft_ms.p50") for f in _files(story)), page.ratio("ttft")),
        ("latency p50, s", *(page.value(f, "summary.latency_s.p50") for f in _files(story)), page.ratio("latency")),
    ])  # fmt: skip
    if reason := story.withheld():
        page.text(f"**No speed-up is shown:** {reason}.")
    if levels := story.levels(story.triton_file):
        cells = []
        for index, level in levels:
            rate = page.value(story.triton_file, f"levels.{index}.summary.output_tokens_per_s.p50", "{:,.0f}")
            cells.append(f"{rate} at {level['concurrency']}")
        page.text(f"Through Triton Inference Server, output tokens/s by concurrent requests: {', '.join(cells)}.")
    else:
        page.text("Triton Inference Server was not measured on this machine.")
    page.text(*(f"![{name[:-4].replace('_', ' ')}]({name})" for name in list(PICTURES)[:4]))


def _setup(page: Page, story: Story) -> None:
    page.text("## Set-up")
    file = next(iter(_files(story)), story.triton_file)
    gpu = story.on_gpu
    rows = [("model", page.value(file, "model.name", "{}") + f" ({page.value(file, 'model.source', '{}')})")]
    rows.append(("model hash", page.value(file, "model.sha256", "`{}`")))
    engine = story.engine_file
    if engine in story.files:
        rows.append(
            (
                "engine",
                f"{page.value(engine, 'engine.kernels', '{}')}, weights {page.value(engine, 'engine.weights_sha256', '`{:.16}`')}",
            )
        )
    rows.append(
        (
            "CPU",
            f"{page.value(file, 'environment.cpu.name', '{}')}, {page.value(file, 'environment.cpu.cores', '{}')} cores, {page.value(file, 'environment.cpu.threads', '{}')} threads, {page.value(file, 'environment.cpu.memory_gb', '{:.0f}')} GB",
        )
    )
    if gpu:
        rows.append(
            (
                "GPU",
                f"{page.value(file, 'environment.gpu.name', '{}')}, driver {page.value(file, 'environment.gpu.driver', '{}')}, power limit {page.value(file, 'environment.gpu.power_limit_w', '{:.0f}')} W, {page.value(file, 'environment.gpu.max_sm_clock_mhz', '{}')} MHz at most",
            )
        )
    else:
        rows.append(("GPU", "none"))
    rows.append(
        ("read bandwidth, this run", page.value(file, "environment.read_bandwidth.bytes_per_s", "{:,.1f} GB/s", 1e-9))
    )
    rows.append(
        ("16-bit matmul rate, this run", page.value(file, "environment.matmul.flop_per_s", "{:,.2f} TFLOP/s", 1e-12))
    )
    libraries = [
        f"{name} {version}"
        for name in ("python", *LIBRARIES)
        if (version := story.get(file, f"environment.software.{name}"))
    ]
    rows.append(("software", ", ".join(libraries)))
    commit, dirty = story.get(file, "environment.git.commit"), story.get(file, "environment.git.dirty")
    rows.append(("source", f"commit `{(commit or 'unknown')[:12]}`{' with local changes' if dirty else ''}"))
    page.table(("", ""), rows, align="---")


def _method(page: Page, story: Story) -> None:
    page.text("## Method")
    file = next(iter(_files(story)), story.triton_file)
    page.text(
        f"Prompts of exactly {page.value(file, 'workload.input_tokens', '{}')} token ids, exactly "
        f"{page.value(file, 'workload.output_tokens', '{}')} new tokens, greedy, EOS ignored, tokens counted as received; "
        f"{page.value(file, 'workload.warmup_runs', '{}')} warm-up and {page.value(file, 'workload.timed_runs', '{}')} timed "
        "runs of each stack, interleaved A B A B in one process on the same ids. TTFT is t1 - t0 and TPOT is "
        "(tN - t1) / (N - 1), each from the same run's clock. Ratios are medians over pairs with a 95 % percentile "
        "bootstrap. MBU is the bytes a decode step must read (weights once, KV of the live tokens) / TPOT p50 / the read "
        "bandwidth measured in this run; MFU is the FLOP of the prompt's linear layers / TTFT / the 16-bit matmul rate "
        "measured in this run. TTFT, TPOT and latency are percentiles over requests, ITL is pooled over tokens. "
        "Definitions: docs/METRICS.md."
    )  # fmt: skip


def _latency(page: Page, story: Story) -> None:
    page.text("## Latency of one request")
    rows = []
    for file in _files(story):
        for key, name in (
            ("ttft_ms", "TTFT, ms"),
            ("tpot_ms", "TPOT, ms"),
            ("itl_ms", "ITL, ms"),
            ("latency_s", "latency, s"),
        ):
            cells = [page.value(file, f"summary.{key}.p{q}") for q in PERCENTILES]
            use = (
                page.value(file, "summary.mfu", "MFU {:.3f}")
                if key == "ttft_ms"
                else page.value(file, "summary.mbu", "MBU {:.2f}")
            )
            rows.append(
                (f"{_label(story, file)}: {name}", *cells, page.value(file, f"summary.{key}.spread", "{:.1%}"), use)
            )
    page.table(("", *(f"p{q}" for q in PERCENTILES), "spread", "of the wall"), rows)
    prefill = [
        (_label(story, file), page.value(file, "summary.prefill_ttft_ms.input_tokens", "{}"), page.value(file, "summary.prefill_ttft_ms.p50"), page.value(file, "summary.prefill_ttft_ms.p99"), page.value(file, "summary.prefill_mfu"))
        for file in _files(story)
        if story.get(file, "summary.prefill_ttft_ms")
    ]  # fmt: skip
    if prefill:
        page.table(("long prompt", "tokens", "TTFT p50, ms", "p99", "MFU"), prefill)
        page.text(f"Speed-up of the long prefill: {page.ratio('prefill')}.")


def _throughput(page: Page, story: Story) -> None:
    page.text("## Throughput at several requests")
    rows = []
    for file, where in ((story.engine_file, "in process"), (story.triton_file, "through Triton")):
        for index, level in story.levels(file):
            at = f"levels.{index}.summary"
            name = f"{where}, {level['concurrency']} at once" + ("" if story.valid(file) else " (INVALID)")
            rows.append((name, page.value(file, f"{at}.output_tokens_per_s.p50", "{:,.0f}"), page.value(file, f"{at}.tpot_ms.p50"), page.value(file, f"{at}.ttft_ms.p50"), page.value(file, f"{at}.ttft_ms.p99"), _mbu(page, file, index)))  # fmt: skip
    if rows:
        page.table(("", "output tokens/s", "TPOT p50, ms", "TTFT p50, ms", "TTFT p99, ms", "MBU"), rows)
        page.text("Output tokens/s is all requests together; TPOT and TTFT are what one request sees.")
    served = story.levels(story.triton_file)
    if len(served) > 1 and story.valid(story.triton_file):
        (first, low), (last, high) = served[0], served[-1]
        a, b = (x["summary"]["output_tokens_per_s"]["p50"] for x in (low, high))
        gain, load = b / a, high["concurrency"] / low["concurrency"]
        page._sources += [f"{story.triton_file}:levels.{i}.summary.output_tokens_per_s.p50" for i in (first, last)]
        page.text(
            f"Scaling from {low['concurrency']} to {high['concurrency']} requests: {gain:.2f}x, {gain / load:.0%} of linear."
        )
    if not served:
        page.text("Triton Inference Server was not measured on this machine.")


def _mbu(page: Page, file: str, index: int) -> str:
    """A level's MBU; of a served level reckoned from its TPOT and the in-process engine's bytes and bandwidth."""
    mbu = page.story.level_mbu(file, index)
    if mbu is None:
        return NONE
    page._sources += [f"{file}:levels.{index}.summary.tpot_ms.p50", f"{page.story.engine_file}:cost"]
    return f"{mbu:.2f}"


def _time(page: Page, story: Story) -> None:
    page.text("## Where the time goes")
    stacks = story.get("profile.json", "stacks")
    if not stacks:
        page.text("No profile was taken on this machine (scripts/profile_nsight.sh).")
    else:
        keys = [
            ("launches_per_token", "CPU launches a token (kernels, graph replays, copies)", "{:,.1f}", 1.0),
            ("kernels_per_token", "GPU kernels executed a token", "{:,.1f}", 1.0),
            ("graph_replays", "CUDA graph replays", "{:,}", 1.0),
            ("api_ms_per_token", "launch API time a token, ms", "{:,.3f}", 1.0),
            ("gpu_busy_share", "device busy while decoding", "{:.1%}", 1.0),
            ("operators_per_token", "PyTorch operators a token, nested ones included", "{:,.1f}", 1.0),
            ("gap_us_mean", "mean gap between kernels, µs", "{:,.1f}", 1.0),
        ]
        head = [STACK_NAMES.get(name, name) for name in stacks]
        measured = [key for key in keys if any(stack.get(key[0]) is not None for stack in stacks.values())]
        page.table(
            ("", *head),
            [
                (label, *(page.value("profile.json", f"stacks.{s}.{key}", form, f) for s in stacks))
                for key, label, form, f in measured
            ],
        )
        for name in stacks:
            top = stacks[name].get("top_kernels", [])[:6]
            page.table((f"{STACK_NAMES.get(name, name)}: top kernels", "share of time", "calls"), [(f"`{k['name'][:70]}`", page.value("profile.json", f"stacks.{name}.top_kernels.{i}.share", "{:.1%}"), page.value("profile.json", f"stacks.{name}.top_kernels.{i}.calls", "{:,}")) for i, k in enumerate(top)])  # fmt: skip
        page.text(
            f"Profiled with {page.value('profile.json', 'profiler', '{}')}; profiling slows a run, so no speed is taken from it."
        )
    rows = []
    for file in _files(story):
        cells = [page.value(file, f"telemetry.{key}", form) for key, form in (("gpu_utilization_pct.mean", "{:.0f} %"), ("gpu_power_w.mean", "{:.0f} W"), ("gpu_sm_clock_mhz.mean", "{:.0f} MHz"), ("gpu_temperature_c.max", "{:.0f} °C"), ("process_cpu_pct.mean", "{:.0f} %"), ("process_memory_gb.max", "{:.2f} GB"))]  # fmt: skip
        rows.append((_label(story, file), *cells))
    page.table(
        ("telemetry while timed", "GPU busy", "power", "SM clock", "hottest", "process CPU", "process memory"), rows
    )
    share = page.value(next(iter(_files(story)), story.engine_file), "telemetry.sampler_busy_share", "{:.2%}")
    page.text(f"Sampled 25 times a second by a thread that was itself busy for {share} of the time.")
    if points := roofline_points(story):
        page._sources += [f"{file}:{key}" for file in _files(story) for key in ("cost", "summary.tpot_ms.p50")]
        page.table(
            ("roofline", "FLOP a byte", "GFLOP/s"), [(p[0], f"{p[1]:,.2f}", f"{p[2] / 1e9:,.1f}") for p in points]
        )
        page.text("![roofline](roofline.png)")


def _accuracy(page: Page, story: Story) -> None:
    page.text("## Accuracy of the same engine")
    file = story.accuracy_file
    if file not in story.files:
        page.text("The accuracy gate was not run (benchmarks/accuracy.py).")
        return
    if story.get(file, "summary.perplexity_ratio") is not None:
        page.table(("against the 16-bit model, teacher-forced", ""), [
            ("tokens scored", page.value(file, "summary.tokens", "{:,}")),
            ("perplexity, 16-bit", page.value(file, "summary.perplexity_baseline", "{:.4f}")),
            ("perplexity, engine", page.value(file, "summary.perplexity_engine", "{:.4f}")),
            ("perplexity ratio", page.value(file, "summary.perplexity_ratio", "{:.5f}")),
            ("KL(16-bit, engine), mean nat", page.value(file, "summary.kl_mean", "{:.5f}")),
            ("KL, largest, nat", page.value(file, "summary.kl_max", "{:.4f}")),
            ("same most likely token", page.value(file, "summary.top1_agreement", "{:.2%}")),
            ("greedy tokens until the first difference, mean", page.value(file, "summary.greedy_agreement_tokens.mean", "{:.1f}") + " of " + page.value(file, "summary.greedy_agreement_tokens.of", "{}")),
        ])  # fmt: skip
    else:
        page.text(
            "Synthetic weights: perplexity and KL would mean nothing. The logits of the engine's kernels against the dequantized weights in float32 instead:"
        )
        page.table(("", ""), [
            ("tokens", page.value(file, "summary.tokens", "{:,}")),
            ("largest logit error / largest logit", page.value(file, "summary.logit_error_max", "{:.2e}")),
            ("RMS logit error / RMS logit", page.value(file, "summary.logit_error_rms", "{:.2e}")),
        ])  # fmt: skip
    reasons = "; ".join(story.get(file, "gate.reasons") or [])
    page.text(f"Gate: **{page.value(file, 'gate.status', '{}')}**{f' ({reasons})' if reasons else ''}.")


def _cost(page: Page, story: Story) -> None:
    page.text("## Cost of a million output tokens")
    places = [(file, "summary", f"{_label(story, file)}, 1 at once") for file in _files(story)]
    for file, where in ((story.engine_file, "in process"), (story.triton_file, "through Triton")):
        places += [(file, f"levels.{i}.summary", f"{where}, {x['concurrency']} at once") for i, x in story.levels(file)]
    rows = []
    for file, at, name in places:
        rate = story.get(file, f"{at}.output_tokens_per_s.p50")
        if rate:
            page._sources.append(f"{file}:{at}.output_tokens_per_s.p50")
            energy = page.value(file, f"{at}.energy_j_per_token", "{:,.3f}", 1 / 3.6)
            rows.append((name, f"{1e6 / rate:,.0f}", energy))
    page.table(("", "GPU-seconds" if story.on_gpu else "machine-seconds", "kWh, GPU board"), rows)


def _waterfall(page: Page, story: Story) -> None:
    steps = waterfall_steps(story)
    if len(steps) < 2:
        return
    page.text("## From baseline to server, step by step")
    rows, previous = [], None
    for name, value, source, _ in steps:
        page._sources.append(source.replace(" ", ":"))
        change = "" if previous is None else f"{value - previous:+.2f}"
        rows.append((name.replace("\n", " "), f"{value:.3f}", change))
        previous = value
    page.table(("one request", "latency / tokens, ms", "change, ms"), rows)
    page.text("![waterfall](waterfall.png)")


def _limits(page: Page, story: Story) -> None:
    page.text("## Limits of validity")
    lines = [
        "* One model, one prompt length and one output length; other lengths shift the balance of prefill and decode."
    ]
    lines.append(
        "* Figures hold for this machine and these library versions; results of different fingerprints are never divided."
    )
    l3 = story.get(story.engine_file, "environment.cpu.l3_bytes")
    nbytes = story.get(story.engine_file, "summary.step_nbytes")
    if not story.on_gpu and l3 and nbytes and nbytes < l3:
        page._sources += [f"{story.engine_file}:environment.cpu.l3_bytes", f"{story.engine_file}:summary.step_nbytes"]
        lines.append(
            f"* A decode step reads {nbytes / 1e6:,.0f} MB and the last-level cache holds {l3 / 1e6:,.0f} MB: part of the weights "
            "may come from the cache, so MBU can pass 1 here. It is a yardstick, not a wall, on this machine."
        )
    if not story.on_gpu:
        lines.append("* No GPU: utilization, power and energy are blank rather than estimated.")
    if story.synthetic:
        lines.append("* Synthetic weights: speed only.")
    lines.append(
        "* The baseline is transformers as users run it (eager, dynamic cache), not the best one could build from it."
    )
    page.text(*lines)


def _reproduce(page: Page, story: Story) -> None:
    page.text("## How to reproduce")
    commands = dict.fromkeys(result["environment"].get("command", "") for result in story.files.values())
    page.text(
        "    ./scripts/run_all.sh",
        *(f"    python {command}" for command in commands if command.endswith(".py") or ".py " in command),
    )


def _others(page: Page, others: Sequence[Story]) -> None:
    page.text("## Other machines")
    rows = []
    for other in others:
        inner = Page(other)
        rate = inner.value(other.engine_file, "summary.output_tokens_per_s.p50", "{:,.1f}")
        base = inner.value(other.baseline_file, "summary.output_tokens_per_s.p50", "{:,.1f}")
        cell = (inner.value(other.engine_file, "summary.mbu"), inner.ratio("latency"))
        model = other.any["model"]["name"] + (", synthetic weights" if other.synthetic else "")
        rows.append((f"[{other.name}]({other.name}/PERFORMANCE_REPORT.md): {other.machine}", model, base, rate, *cell))
        page._sources += [f"{other.name}/{source}" for source in inner._sources]
    page.table(("", "model", "baseline tok/s", "engine tok/s", "MBU", "latency speed-up"), rows)


def readme_block(stories: Sequence[Story]) -> str:
    """The README's results: one table over all published machines."""
    lines = [README_MARKS[0], "| machine, model | baseline tok/s | engine tok/s | MBU | speed-up, 95 % interval | TTFT ms, before → after | Triton tok/s |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for story in stories:
        page = Page(story)
        value = page.value
        served = [
            f"{level['summary']['output_tokens_per_s']['p50']:,.0f} at {level['concurrency']}"
            for _, level in story.levels(story.triton_file)
        ]
        model = story.any["model"]["name"] + (", **synthetic weights**" if story.synthetic else "")
        ttft = " → ".join(value(file, "summary.ttft_ms.p50", "{:,.1f}") for file in _files(story))
        speed = [
            value(file, "summary.output_tokens_per_s.p50", "{:,.1f}")
            for file in (story.baseline_file, story.engine_file)
        ]
        mbu = value(story.engine_file, "summary.mbu")
        lines.append(f"| [{story.machine}](results/{story.name}/PERFORMANCE_REPORT.md), {model} | {speed[0]} | {speed[1]} | {mbu} | {page.ratio('latency')} | {ttft} | {', '.join(served) or NONE} |")  # fmt: skip
    notes = [f"No speed-up is shown for {story.name}: {reason}." for story in stories if (reason := story.withheld())]
    return "\n".join([*lines, *([""] if notes else []), *notes, README_MARKS[1]])


def replace_block(text: str, block: str) -> str | None:
    """``text`` with the README block between the marks replaced, or None when the marks are missing."""
    start, end = (text.find(mark) for mark in README_MARKS)
    if start < 0 or end < start:
        return None
    return text[:start] + block + text[end + len(README_MARKS[1]) :]
