"""One machine's results put together: what belongs to what, and which figures may be shown."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from llama_engine.errors import InputError
from llama_engine.measure.cost import Cost
from llama_engine.measure.result import MEASUREMENTS, Result, dig, load_folder, load_result, result_files
from llama_engine.measure.validity import MIN_ACCURACY_TOKENS


class _StackNames(dict[str, str]):
    """An engine that is not named here has its results shown all the same."""

    def __missing__(self, backend: str) -> str:
        return f"{backend} engine"


STACK_NAMES = _StackNames(transformers="Baseline", native="Native INT8 engine", tensorrt_llm="TensorRT-LLM engine")


# Between baseline and engine, where they were measured: each differs from the one before in what its name says.
ABLATIONS = {
    "ablation-compiled": "static cache,\ntorch.compile",
    "ladder-fp16": "native engine,\n16-bit",
    "ablation-int8": "INT8, a kernel\nan operation",
}


class Derived(NamedTuple):
    """A value computed from those at ``places``, each a file alias and a path: ``triton.levels.0.concurrency``."""

    value: float | None
    places: tuple[str, ...]


class WaterfallStep(NamedTuple):
    """Latency p50 / tokens in ms, and its change from the step before."""

    name: str
    file: str
    ms: Derived
    change: Derived | None


class RooflinePoint(NamedTuple):
    """FLOP per byte and FLOP/s of one load of a stack."""

    name: str
    file: str
    intensity: Derived
    flop_per_s: Derived


@dataclass
class Story:
    """The results of one folder. ``files`` maps a file name such as ``baseline.json`` to its content, ``tournaments``
    those of its folder of that name, of which no picture is drawn."""

    name: str
    files: dict[str, Result]
    sha256: str
    tournaments: dict[str, Result] = field(default_factory=dict)
    price_per_hour: float | None = None  # of one GPU, or of the machine without one, in dollars

    @classmethod
    def load(cls, folder: Path | str, price_per_hour: float | None = None) -> Story:
        """Read a results folder. Raises :class:`InputError` when it is empty or a file is broken."""
        folder = Path(folder)
        files = {f"{stem}.json": result for stem, result in load_folder(folder).items()}
        if not any(result["benchmark"] in MEASUREMENTS for result in files.values()):
            raise InputError(f"{folder} holds no result files of a measurement: run scripts/run_all.sh")
        digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in sorted(files))).hexdigest()
        held = {path.name: load_result(path) for path in result_files(folder / "tournaments")}
        return cls(folder.name, files, digest, held, price_per_hour)

    @cached_property
    def backend(self) -> str:
        engines = (r for r in self.files.values() if r["benchmark"] in ("comparison", "optimized"))
        return next((result["backend"] for result in engines), "native")

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Short names of files; ``any`` is the first measurement there is."""
        names = {
            "base": "baseline.json",
            "engine": f"optimized-{self.backend}.json",
            "triton": f"triton-{self.backend}.json",
            "whole": f"triton-{self.backend}-whole.json",
        }
        return names | {
            "any": next(name for name in (*names.values(), *self.files) if name in self.files),
            "accuracy": f"accuracy-{self.backend}.json",
            "determinism": f"determinism-{self.backend}.json",
            "failover": "failover.json",
            "comparison": "comparison.json",
            "profile": "profile.json",
            **{name.removesuffix(".json"): name for name in self.files if name.startswith(("ladder-", "ablation-"))},
        }

    @property
    def any(self) -> Result:
        return self.files[self.aliases["any"]]

    def get(self, file: str, path: str) -> Any:
        """A value of a result file, given by name or alias, or None."""
        return dig(self.files.get(self.aliases.get(file, file)), path)

    def at(self, place: str) -> Any:
        """The value at ``alias.path``, or None."""
        return self.get(*place.split(".", 1))

    def valid(self, file: str) -> bool:
        return self.get(file, "validity.status") == "VALID"

    def level_valid(self, file: str, level: dict[str, Any]) -> bool:
        return level["validity"]["status"] == "VALID" if "validity" in level else self.valid(file)

    def mark(self, file: str, level: dict[str, Any]) -> str:
        """What stands behind the figures of an INVALID load."""
        return "" if self.level_valid(file, level) else "*"

    @property
    def invalid(self) -> dict[str, list[str]]:
        """The reasons of each file, or load of one, that is INVALID."""
        return self._verdicts("reasons")

    @property
    def cautions(self) -> dict[str, list[str]]:
        """What is to be read with care in each file, or load of one."""
        return self._verdicts("cautions")

    def _verdicts(self, key: str) -> dict[str, list[str]]:
        found = {name: why for name, x in self.files.items() if (why := x["validity"].get(key))}
        for name, result in self.files.items():
            for level in result.get("levels", []):
                if (key == "cautions" or name not in found) and (why := level.get("validity", {}).get(key)):
                    found[f"{name} at {level.get('concurrency', level.get('rate'))}"] = why
        return found

    def invalid_loads(self, file: str) -> list[tuple[str, str]]:
        """(load, reasons) of what is INVALID in a file; the load is "" for the whole file."""
        names = {name.partition(" at "): "; ".join(reasons) for name, reasons in self.invalid.items()}
        return [(load, reasons) for (name, _, load), reasons in names.items() if name == self.aliases[file]]

    @property
    def synthetic(self) -> bool:
        return self.any["model"]["source"] == "synthetic"

    @property
    def on_gpu(self) -> bool:
        return self.any["environment"]["gpu"] is not None

    @property
    def cached(self) -> bool:
        """Whether the last-level cache of a CPU holds all that a decode step reads."""
        l3, nbytes = self.get("engine", "environment.cpu.l3_bytes"), self.get("engine", "summary.step_nbytes")
        return bool(not self.on_gpu and l3 and nbytes and nbytes < l3)

    @property
    def machine(self) -> str:
        cpu, gpu = self.any["environment"]["cpu"], self.any["environment"]["gpu"]
        return gpu["name"] if gpu else f"{cpu['name']}, {cpu['cores']} cores"

    def levels(self, file: str) -> list[tuple[int, dict[str, Any]]]:
        """(index in the file, level) of the greedy closed-loop levels that have figures, by concurrency."""
        levels = enumerate(self.get(file, "levels") or [])
        levels = [(i, level) for i, level in levels if "sampling" not in level.get("workload", {})]
        closed = [(i, level) for i, level in levels if "concurrency" in level and level["summary"].get("latency_s")]
        return sorted(closed, key=lambda item: item[1]["concurrency"])

    def throughput(self, file: str) -> list[tuple[int, float, str]]:
        """(requests at once, tokens/s of all, the mark of an INVALID load) by load."""
        levels = (level for _, level in self.levels(file))
        return [(x["concurrency"], x["summary"]["output_tokens_per_s"]["p50"], self.mark(file, x)) for x in levels]

    def stacks(self) -> list[tuple[str, str]]:
        """(file alias, label in two lines) of the in-process stacks that were measured."""
        engine = STACK_NAMES[self.backend].replace(" INT8 ", "\nINT8 ")
        labels = {"base": "Baseline\n(transformers, 16-bit)", "engine": engine}
        return [(file, label) for file, label in labels.items() if self.aliases[file] in self.files]

    def withheld(self) -> str | None:
        """Why no speed-up may be shown, or None when it may: validity first, then the accuracy gate."""
        if "comparison.json" not in self.files:
            return "no paired comparison was run (benchmarks/compare.py)"
        if not self.valid("comparison"):
            return "a run is INVALID: " + "; ".join(self.get("comparison", "validity.reasons"))
        if self.aliases["accuracy"] not in self.files:
            return "the accuracy gate was not run on this engine (benchmarks/accuracy.py, which takes native ones)"
        weights = "engine.weights_sha256"
        if self.get("accuracy", weights) != self.get("comparison", weights):
            return "the accuracy gate was run on another engine"
        if self.get("accuracy", "gate.status") != "PASSED":
            return "the accuracy gate failed: " + "; ".join(
                self.get("accuracy", "gate.reasons") or ["no reason recorded"]
            )
        return None

    @property
    def quick_gate(self) -> str:
        """What an accuracy gate that was made with ``--quick`` scored, "" for a full one.

        With synthetic weights ``--quick`` changes nothing.
        """
        if self.synthetic or not self.get("accuracy", "gate.quick"):
            return ""
        scored = self.get("accuracy", "summary.tokens")
        return f"quick gate: {scored:,} tokens scored, a full one takes {MIN_ACCURACY_TOKENS:,}"

    def speedup(self, metric: str) -> dict[str, Any] | None:
        """``{"ratio", "ci95", "verdict"}``, or None while :meth:`withheld`."""
        return None if self.withheld() else self.get("comparison", f"speedup.{metric}")


def best_load(loads: list[tuple[int, float, str]]) -> tuple[int, float, str]:
    """The largest load of :meth:`Story.throughput` that is valid, if any is."""
    return ([load for load in loads if not load[2]] or loads)[-1]


def waterfall_steps(story: Story) -> list[WaterfallStep]:
    """One request on each stack, one change further each time, then served; only what had the same workload."""
    shape = ("workload.input_tokens", "workload.output_tokens")
    stacks = dict(story.stacks())
    between = [(file, label) for file, label in ABLATIONS.items() if story.aliases.get(file) in story.files]
    order = [*[(x, stacks[x]) for x in ("base",) if x in stacks], *between]
    order += [(x, label) for x, label in stacks.items() if x != "base"]
    first = order[0][0] if order else ""
    same = [(file, label) for file, label in order if all(story.get(file, k) == story.get(first, k) for k in shape)]
    places = [(label, file, "summary.latency_s.p50") for file, label in same]
    if all(story.get("engine", key) == story.get("triton", key) for key in shape):
        alone = [i for i, level in story.levels("triton") if level["concurrency"] == 1]
        places += [("through Triton", "triton", f"levels.{i}.summary.latency_s.p50") for i in alone[:1]]
    steps: list[WaterfallStep] = []
    for name, file, path in places:
        if story.valid(file):
            value = story.get(file, path) / story.get(file, shape[1]) * 1e3
            ms = Derived(value, (f"{file}.{path}", f"{file}.{shape[1]}"))
            last = steps[-1].ms if steps else None
            change = last and Derived(value - last.value, last.places + ms.places)
            steps.append(WaterfallStep(name, file, ms, change))
    return steps


def roofline_points(story: Story) -> list[RooflinePoint]:
    """Decode of one request and of batches, and the long prefill, of each stack."""
    points = []
    for file, label in story.stacks():
        name, result = label.replace("\n", " "), story.files[story.aliases[file]]
        cost, flop = Cost(**result["cost"]), result["cost"]["flop_per_token"]
        loads = [("decode", "", result | {"concurrency": 1})]
        for i, level in story.levels(file):
            loads.append((f"decode, {level['concurrency']} at once{story.mark(file, level)}", f"levels.{i}.", level))
        steps = []  # (what, FLOP, bytes, path of the ms it takes)
        for what, at, load in loads:
            n, shape = load["concurrency"], load["workload"]
            nbytes = cost.decode_nbytes(shape["input_tokens"], shape["output_tokens"], n)
            steps.append((what, n * flop, nbytes, f"{at}summary.tpot_ms.p50"))
        if size := story.get(file, "summary.prefill_ttft_ms.input_tokens"):
            nbytes = cost.decode_nbytes(0, 2 * size)
            steps.append((f"prefill {size}", flop * size, nbytes, "summary.prefill_ttft_ms.p50"))
        for what, work, nbytes, path in steps:
            places = (f"{file}.cost", f"{file}.{path}")
            rate = Derived(work / story.get(file, path) * 1e3, places)
            points.append(RooflinePoint(f"{name}: {what}", file, Derived(work / nbytes, places[:1]), rate))
    return points
