"""What sampling costs: the same batches greedy and sampled in turns, on one engine in one process.

Method: for every number of requests at once, greedy and each kind of sampling A B A B, each answered with exactly
--output-tokens; a round's rate is tokens / wall time from the first t0 to the last tN. The ratio is sampled over greedy
of the medians, with a 95 % bootstrap interval over the rounds: 0.9 is the target on a CPU, 0.95 on a GPU.
Output: a table.

    python benchmarks/sampling.py --engine-dir engines/smollm2-135m-instruct --device cpu --threads 2
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llama_engine.config import check_length
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure import protocol
from llama_engine.measure.generation import progress_bar
from llama_engine.measure.stacks import EngineStack
from llama_engine.measure.stats import bootstrap_ratio, percentile
from llama_engine.measure.text import Text, codec_of
from llama_engine.sampling import SamplingParams

KINDS = {
    "greedy": None,
    "temperature 0.8": SamplingParams(0.8),
    "and top-p 0.95": SamplingParams(0.8, top_p=0.95),
    "and top-k 50": SamplingParams(0.8, top_k=50, top_p=0.95),
    "temperature, penalties": SamplingParams(0.8, repetition_penalty=1.1, presence_penalty=0.5),
}
INPUT_TOKENS = 32


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--engine-dir", type=Path, default=Path("engines/smollm2-135m-instruct"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--output-tokens", type=int, default=128, help="new tokens a request, exactly")
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each")
    args = parser.parse_args()
    device, info = protocol.use_device(args.device, args.threads), load_engine_json(args.engine_dir, backend="native")
    limit = info.engine.max_batch_size
    if bad := [count for count in args.batch if not 1 <= count <= limit]:
        raise InputError(f"--batch {bad[0]}: this engine was built for 1 to {limit} (max_batch_size)")
    if args.rounds < 1 or args.output_tokens < 1:
        raise InputError("--rounds and --output-tokens must be at least 1")
    check_length(info.engine, INPUT_TOKENS, args.output_tokens, "--output-tokens")
    stack = protocol.open_engine(args.engine_dir, info, device=device, threads=args.threads)
    assert isinstance(stack, EngineStack)
    text = Text(codec_of([args.engine_dir], info.model.vocab_size))
    table = Table(f"{stack.about['kernels']}, tokens/s", *KINDS)
    with progress_bar() as bar:
        task = bar.add_task("", total=len(args.batch) * (args.rounds + 1))
        for count in args.batch:
            prompts = [text.take(INPUT_TOKENS) for _ in range(count)]
            rates = measure(stack, prompts, args.output_tokens, args.rounds, lambda: bar.advance(task))
            table.add_row(f"{count} at once", *(cell(rate, rates["greedy"]) for rate in rates.values()))
    Console().print(table)


def measure(
    stack: EngineStack, prompts: list[list[int]], new_tokens: int, rounds: int, advance: Callable[[], object]
) -> dict[str, list[float]]:
    """Tokens/s of all ``prompts`` at once by kind, a rate a round; the first round is not counted."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        for kind, sampling in KINDS.items():
            runs = stack.generate_batch(prompts, new_tokens, sampling)
            wall = max(run.token_times[-1] for run in runs) - runs[0].t0
            rates[kind] += [sum(len(run.token_ids) for run in runs) / wall] if turn else []
        advance()
    return rates


def cell(rates: list[float], greedy: list[float]) -> str:
    """The median, and sampled over greedy."""
    text = f"{percentile(rates, 50):,.1f}"
    if rates is greedy:
        return text
    ratio = bootstrap_ratio(rates, greedy)
    return f"{text}, {ratio['ratio']:.3f}x [{ratio['ci95'][0]:.3f}, {ratio['ci95'][1]:.3f}]"


if __name__ == "__main__":
    run_cli(main)
