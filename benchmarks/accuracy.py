"""The accuracy gate: the INT8 engine, through its own kernels and paged cache, against the 16-bit transformers model.

Method: both models score the same windows of a public-domain novel (benchmarks/data/README.md), teacher-forced:
perplexity, KL(16-bit, engine) a token, agreement of the most likely token; then greedy continuations until the first
difference. With synthetic weights those figures would mean nothing: logits are compared with float32 arithmetic on the
dequantized weights instead, of whole windows and of prompts and answers served as requests are. Gate: perplexity
ratio <= 1.01 and mean KL <= 0.01 nat, or those errors <= 1 %; exit code 1 when it fails.
Output: a result file with the figures and "gate". --quick scores an eighth of 20,000 tokens.

    python benchmarks/accuracy.py --model-dir models/smollm2-135m-instruct --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from llama_engine.checkpoint.hf import model_identity
from llama_engine.config import check_length
from llama_engine.engine_dir import EngineInfo, load_engine_json
from llama_engine.errors import InputError, RunError, run_cli
from llama_engine.measure import accuracy, protocol, result, validity
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.generation import make_prompts, progress_bar, tokenize
from llama_engine.measure.stacks import TransformersStack
from llama_engine.measure.workload import check_model
from llama_engine.model.llama import TorchModel
from llama_engine.native import load_engine

TEXT = Path(__file__).with_name("data") / "alice.txt"
SYNTHETIC_WINDOWS, SERVED_TOKENS, GREEDY_INPUT = 4, 32, 32


def main() -> None:
    parser = protocol.parser_for(__doc__, "results/local/accuracy-native.json")
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/smollm2-135m-instruct"))
    parser.add_argument("--text", type=Path, default=TEXT, help="what to score")
    parser.add_argument("--window", type=int, default=512, help="tokens of context, scored independently")
    parser.add_argument("--greedy-prompts", type=int, default=8, help="continuations to compare")
    parser.add_argument("--greedy-tokens", type=int, default=64, help="tokens of each")
    parser.add_argument("--quick", action="store_true", help="score an eighth of 20,000 tokens")
    args = parser.parse_args()
    result.check_output(args.output, args.force, args.model_dir, args.engine_dir)
    if not args.text.is_file():
        raise InputError(f"--text {args.text} does not exist")
    device = protocol.use_device(args.device, args.threads)
    info = load_engine_json(args.engine_dir)
    limit = info.engine.max_seq_len
    if not 2 <= args.window <= limit:
        raise InputError(f"--window must be 2 to {limit} (the engine's max_seq_len)")
    if args.greedy_prompts < 0 or args.greedy_tokens < 1:
        raise InputError("--greedy-prompts must be at least 0, --greedy-tokens at least 1")
    model = model_identity(args.model_dir)
    if args.greedy_prompts and model["source"] != "synthetic":
        check_length(info.engine, GREEDY_INPUT, args.greedy_tokens, "--greedy-tokens")
    scoring = Scoring(
        args.model_dir, model, args.text, args.window, args.greedy_prompts, args.greedy_tokens, args.quick
    )
    windows = scoring.windows()
    check_model(info, model)
    measured = run(scoring, windows, args.engine_dir, info, device, args.threads)
    result.write_result(args.output, measured, force=args.force)
    for key, value in measured["summary"].items():
        print(f"{key:<24} {value if not isinstance(value, dict) else value['mean']}")
    print(f"gate {measured['gate']['status']}")
    if measured["gate"]["status"] != "PASSED":
        raise RunError("the accuracy gate failed: " + "; ".join(measured["gate"]["reasons"]))


@dataclass(frozen=True)
class Scoring:
    """What is scored: windows of a text, and greedy continuations of it. ``model`` is the identity of ``model_dir``."""

    model_dir: Path
    model: dict[str, str]
    text_file: Path
    window: int
    greedy_prompts: int
    greedy_tokens: int
    quick: bool

    @cached_property
    def text(self) -> str:
        try:
            return self.text_file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"--text {self.text_file} is not UTF-8 text") from None

    @property
    def synthetic(self) -> bool:
        return self.model["source"] == "synthetic"

    def windows(self) -> list[list[int]]:
        """Successive windows of the text's ids; seeded random ids for a model without a tokenizer."""
        if self.synthetic or not (self.model_dir / "tokenizer.json").is_file():
            return make_prompts(self.model_dir, self.text, self.window, SYNTHETIC_WINDOWS)
        ids = tokenize(self.model_dir, self.text)
        windows = [ids[start : start + self.window] for start in range(0, len(ids), self.window)]
        enough = -(-validity.MIN_ACCURACY_TOKENS // (self.window - 1))  # the first token of a window is not scored
        windows = [window for window in windows if len(window) > 1]
        if not windows:
            raise InputError(f"--text {self.text_file} holds fewer than two tokens: there is nothing to predict")
        return windows[: enough // 8 or 1 if self.quick else enough]


def run(
    scoring: Scoring, windows: list[list[int]], engine_dir: Path, info: EngineInfo, device: str, threads: int | None
) -> result.Result:
    synthetic = scoring.synthetic
    reference: accuracy.Logits
    if synthetic:
        reference, name = float_reference(engine_dir, device), "float32 on the dequantized weights"
    else:
        baseline = TransformersStack(scoring.model_dir, device)
        name = f"transformers, SDPA, {baseline.dtype}"

        @torch.inference_mode()
        def reference(ids: list[int]) -> torch.Tensor:
            return baseline.model(torch.tensor([ids], device=device)).logits[0]

    # after the reference: an engine's KV cache takes a share of the memory that is free
    stack = protocol.open_engine(engine_dir, info, device=device, threads=threads)

    def engine(ids: list[int]) -> torch.Tensor:
        return accuracy.engine_logits(stack.engine, ids)

    with progress_bar() as bar:
        scored = bar.track(windows, description="scoring")
        figures = accuracy.compare_logits(reference, engine, scored, synthetic=synthetic)
        if synthetic:
            served = (accuracy.served_error(reference, stack.engine, ids[:32], SERVED_TOKENS) for ids in windows)
            figures["served_error_rms"] = max(served, key=lambda error: (error != error, error))  # NaN above all
        elif scoring.greedy_prompts:
            new_tokens = scoring.greedy_tokens
            prompts = make_prompts(scoring.model_dir, scoring.text, GREEDY_INPUT, scoring.greedy_prompts)
            pairs = [
                (baseline.generate(prompt, new_tokens), stack.generate(prompt, new_tokens))
                for prompt in bar.track(prompts, description="greedy")
            ]
            figures["greedy_agreement_tokens"] = accuracy.greedy_agreement(*zip(*pairs))
    return result.new_result(
        "accuracy",
        "native",
        model=scoring.model,
        workload={"text": scoring.text_file.name, "window": scoring.window, "windows": len(windows)},
        environment=fingerprint(device),
        summary=figures,
        engine=stack.about,
        reference=name,
        gate=accuracy.gate(figures, full=not scoring.quick),
    )


def float_reference(engine_dir: Path, device: str) -> accuracy.Logits:
    """The PyTorch reference on the same engine's dequantized weights, float32 activations."""
    engine = load_engine(engine_dir, device=device, kernels="torch", max_batch_size=1)
    model: TorchModel = engine.executor._model  # type: ignore[attr-defined]
    model.dtype = torch.float32  # on a GPU the fallback would run in float16, which is no reference
    return lambda ids: accuracy.engine_logits(engine, ids)


if __name__ == "__main__":
    run_cli(main)
