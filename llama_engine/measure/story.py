"""One machine's results put together: what belongs to what, and which figures may be shown."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_engine.errors import InputError
from llama_engine.measure.generation import Cost
from llama_engine.measure.result import Result, load_folder

STACK_NAMES = {"transformers": "Baseline", "native": "Native INT8 engine", "tensorrt_llm": "TensorRT-LLM engine"}


def dig(data: Any, path: str) -> Any:
    """``dig(result, "summary.ttft_ms.p50")``; None where a step is missing. A number indexes a list."""
    for key in path.split("."):
        if isinstance(data, list) and key.isdigit() and int(key) < len(data):
            data = data[int(key)]
        elif isinstance(data, dict):
            data = data.get(key)
        else:
            return None
    return data


@dataclass
class Story:
    """The results of one folder. ``files`` maps a file name such as ``baseline.json`` to its content."""

    name: str
    files: dict[str, Result]
    sha256: str
    backend: str = field(init=False)

    def __post_init__(self) -> None:
        backends = [name[10:-5] for name in self.files if name.startswith("optimized-")]
        compared = self.files.get("comparison.json")
        self.backend = compared["backend"] if compared else (backends or ["native"])[0]
        if not any(result["benchmark"] in ("baseline", "optimized", "triton") for result in self.files.values()):
            raise InputError(f"results of {self.name!r} hold no measurement to report: run scripts/run_all.sh")

    @classmethod
    def load(cls, folder: Path | str) -> Story:
        """Read a results folder. Raises :class:`InputError` when it is empty or a file is broken."""
        folder = Path(folder)
        files = {f"{stem}.json": result for stem, result in load_folder(folder).items()}
        digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in sorted(files))).hexdigest()
        return cls(folder.name, files, digest)

    @property
    def baseline_file(self) -> str:
        return "baseline.json"

    @property
    def engine_file(self) -> str:
        return f"optimized-{self.backend}.json"

    @property
    def triton_file(self) -> str:
        return f"triton-{self.backend}.json"

    @property
    def accuracy_file(self) -> str:
        named = f"accuracy-{self.backend}.json"
        return named if named in self.files else "accuracy.json"

    @property
    def any(self) -> Result:
        order = (self.engine_file, self.baseline_file, self.triton_file)
        return next(self.files[name] for name in (*order, *self.files) if name in self.files)

    def get(self, file: str, path: str) -> Any:
        """A value of a result file, or None."""
        return dig(self.files.get(file), path)

    def valid(self, file: str) -> bool:
        return self.get(file, "validity.status") == "VALID"

    @property
    def synthetic(self) -> bool:
        return self.any["model"]["source"] == "synthetic"

    @property
    def on_gpu(self) -> bool:
        return self.any["environment"]["gpu"] is not None

    @property
    def machine(self) -> str:
        environment = self.any["environment"]
        if environment["gpu"]:
            return environment["gpu"]["name"]
        return f"{environment['cpu']['name']}, {environment['cpu']['cores']} cores"

    def levels(self, file: str) -> list[tuple[int, dict[str, Any]]]:
        """(index in the file, level) of the closed-loop levels, by concurrency. None of an INVALID file."""
        levels = self.get(file, "levels") or []
        closed = [(i, level) for i, level in enumerate(levels) if "concurrency" in level]
        return sorted(closed, key=lambda item: item[1]["concurrency"])

    def level_mbu(self, file: str, index: int) -> float | None:
        """MBU of a level: as recorded, else from its TPOT p50 and the engine's cost and measured read bandwidth."""
        level = self.files[file]["levels"][index]
        if (recorded := dig(level, "summary.mbu")) is not None:
            return recorded
        cost = self.get(self.engine_file, "cost")
        bandwidth = self.get(self.engine_file, "environment.read_bandwidth.bytes_per_s")
        workload = self.get(file, "workload") | level.get("workload", {})
        tpot = dig(level, "summary.tpot_ms.p50")
        if not (cost and bandwidth and tpot and {"input_tokens", "output_tokens"} <= set(workload)):
            return None
        nbytes = Cost(**cost).decode_nbytes(workload["input_tokens"], workload["output_tokens"], level["concurrency"])
        return nbytes / (tpot / 1e3) / bandwidth

    def withheld(self) -> str | None:
        """Why no speed-up may be shown, or None when it may: validity first, then the accuracy gate."""
        compared = self.files.get("comparison.json")
        if compared is None:
            return "no paired comparison was run (benchmarks/compare.py)"
        if compared["validity"]["status"] != "VALID":
            return "a run is INVALID: " + "; ".join(compared["validity"]["reasons"])
        accuracy = self.files.get(self.accuracy_file)
        if accuracy is None:
            return "the accuracy gate was not run on this engine (benchmarks/accuracy.py)"
        if dig(accuracy, "engine.weights_sha256") != dig(compared, "engine.weights_sha256"):
            return "the accuracy gate was run on another engine"
        if dig(accuracy, "gate.status") != "PASSED":
            return "the accuracy gate failed: " + "; ".join(dig(accuracy, "gate.reasons") or ["no reason recorded"])
        return None

    def speedup(self, metric: str) -> dict[str, Any] | None:
        """``{"ratio", "ci95", "verdict"}``, or None while :meth:`withheld`."""
        return None if self.withheld() else self.get("comparison.json", f"speedup.{metric}")
