r"""Several engines on one machine and one clock, in turn: A B C A B C, with a 95 % interval on every ratio.

Purpose: is X faster than Y, by how much, on which workload, on this machine.
Method:  contestants are servers that run (--target NAME=URL: http:// is an OpenAI API, grpc:// is Triton) and engines
         loaded here, each in a process of its own (--stack KIND:PATH). In each round all of them get the same prompts;
         the next round has others. Ratios are those of the rounds' medians over the first contestant's, paired by
         round. GPU memory is shared, each stack taking its part, or with --swap given to one stack at a time.
Output:  results/local/tournaments/tournament.json, a table on that folder's page. Exit code 1 if no load is VALID.

    python benchmarks/tournament.py --target ours=http://127.0.0.1:8080 --target other=http://127.0.0.1:8000 \
        --model-dir models/smollm2-135m-instruct --workload short chat --concurrency 1 8
    python benchmarks/tournament.py --stack int8=native:engines/llama --stack vllm:models/llama,quantization=fp8 \
        --model-dir models/llama --workload short@1,8,64,256 sampled@1,64 document@64 long@1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_engine.checkpoint.hf import HFModel, model_identity
from llama_engine.device import pick_device
from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure import served
from llama_engine.measure.contestants import Cell, Contestant, ServedContestant, StackContestant
from llama_engine.measure.demand import Demand
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.peers import KINDS
from llama_engine.measure.result import check_output, write_result
from llama_engine.measure.telemetry import Nvml
from llama_engine.measure.text import Text, codec_of
from llama_engine.measure.tournament import Tournament, play
from llama_engine.measure.traffic import Traffic
from llama_engine.report.show import show_tournament
from llama_engine.serving.openai_target import OpenAITarget
from llama_engine.serving.target import Target, TritonTarget


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--target", action=Entry, dest="entries", metavar="NAME=URL", help="a running server; repeat")
    parser.add_argument("--stack", action=Entry, dest="entries", metavar="[NAME=]KIND:PATH[,OPTION=VALUE...]",
                        help=f"an engine to load, of {', '.join(KINDS)}; repeat")  # fmt: skip
    parser.add_argument("--model-dir", type=Path, required=True, help="of the model: its tokenizer, its identity")
    parser.add_argument("--workload", nargs="+", default=["short"], metavar="NAME[@N,N...]",
                        help="of benchmarks/workloads/, or JSON files, each with its own loads")  # fmt: skip
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8], help="of a workload that names none")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each, after one to warm up (default: 5)")
    parser.add_argument("--per-user", type=int, default=2, help="requests of each user of a server in a turn")
    parser.add_argument("--endpoint", choices=["completions", "chat"], default="completions", help="of OpenAI's API")
    parser.add_argument("--swap", action="store_true", help="load one stack at a time")
    parser.add_argument("--most-seconds", type=float, help="begin no further load after so long; not with --swap")
    parser.add_argument("--prefix-cache", action="store_true", help="let them answer from a prefix cache")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a server has for one answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/local/tournaments/tournament.json"))
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    entries = args.entries or []
    names = [name for name, _, _ in entries]
    if len(entries) < 2 or len(set(names)) < len(names):
        raise InputError("a tournament takes two or more --target and --stack with different names")
    if min(args.rounds, args.per_user, *args.concurrency) < 1:
        raise InputError("--rounds, --per-user and --concurrency must be at least 1")
    cells = [cell for text in args.workload for cell in cells_of(text, args.concurrency)]
    if args.swap and any(kind == "target" for _, kind, _ in entries):
        raise InputError("--swap loads and unloads stacks: a --target is loaded all the time")
    if args.most_seconds is not None and (args.swap or args.most_seconds <= 0):
        raise InputError("--most-seconds must be above 0, and with --swap no load ends before all do")
    output = check_output(args.output, args.force, args.model_dir)
    identity = model_identity(args.model_dir)
    device = pick_device(args.device).type
    environment = fingerprint(device)
    vocab = None if (args.model_dir / "tokenizer.json").is_file() else HFModel(args.model_dir).config.vocab_size
    codec = codec_of([args.model_dir], vocab)
    stacks = sum(kind == "stack" for _, kind, _ in entries)
    present = len((Nvml().read("nvmlDeviceGetComputeRunningProcesses") or ()) if device == "cuda" else ())
    contestants = [contestant(args, name, kind, what, codec.decode, device, stacks) for name, kind, what in entries]
    tournament = Tournament(
        contestants, cells, args.rounds, lambda: Text(codec, args.seed), args.swap, args.seed, args.most_seconds
    )
    rates: dict[str, float | None] = {}

    async def null(who: Contestant) -> float | None:
        """The ceiling of this client over the contestant's API, measured once for each API."""
        if not isinstance(who, ServedContestant):
            return None
        triton = who.url.startswith("grpc://")
        key = who.url if triton else "openai"
        if key not in rates:
            asked = Demand(Traffic(), [max(cell.users for cell in cells)], [])
            opened = (
                served.triton_null("grpc", who.url.removeprefix("grpc://"))
                if triton
                else served.openai_null(Text(codec), args.endpoint == "chat")
            )
            async with opened() as idle:
                rates[key] = (await served.null_rate_of(idle, asked, Text(codec)))[0]
        return rates[key]

    cores = sum(what.startswith("vllm:") for _, _, what in entries)  # vLLM's core may be a second process
    own = 1 + stacks + cores + (present if stacks < len(entries) else 0)
    work = play(tournament, environment, identity, prefix_cache=args.prefix_cache, null=null, own_processes=own)
    result = asyncio.run(work)
    write_result(output, result, force=args.force)
    show_tournament(result)
    print(f"wrote {output}")
    return 0 if result["validity"]["status"] == "VALID" else 1


class Entry(argparse.Action):
    """--target and --stack fill one list, so that the command line's order is the order of play."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        entries = getattr(namespace, self.dest) or []
        named = re.fullmatch(r"([\w.+-]+)=(.+)", value)
        if option == "--target":
            if not named or not re.match(r"(https?|grpc)://.", named[2]):
                raise InputError(f"--target takes NAME=http://HOST:PORT or NAME=grpc://HOST:PORT, got {value!r}")
            entries.append((named[1], "target", named[2]))
        else:
            name, what = (named[1], named[2]) if named and ":" not in named[1] else (value.partition(":")[0], value)
            kind, _, path = what.partition(":")
            if kind not in KINDS or not path:
                raise InputError(f"--stack takes KIND:PATH with KIND one of {', '.join(KINDS)}, got {value!r}")
            entries.append((name, "stack", what))
        setattr(namespace, self.dest, entries)


def contestant(
    args: argparse.Namespace, name: str, kind: str, what: str, decode: Any, device: str, stacks: int
) -> Contestant:
    """One of the command line's entries. Raises :class:`InputError`."""
    if kind == "target":

        def opened() -> Target:
            if what.startswith("grpc://"):
                return TritonTarget("grpc", what.removeprefix("grpc://"))
            return OpenAITarget(what, chat=args.endpoint == "chat", decode=decode)

        return ServedContestant(name, what, opened, args.per_user, args.timeout)
    stack, _, rest = what.partition(":")
    path, *options = rest.split(",")
    if not Path(path).exists():
        raise InputError(f"--stack {what}: {path} does not exist")
    memory = "alone" if stacks == 1 else "swapped" if args.swap else "shared"
    job = {"kind": stack, "path": path, "device": device, "prefix_cache": args.prefix_cache}
    job |= {"share": 1 / stacks if memory == "shared" else 1.0, "options": dict(map(option_of, options))}
    return StackContestant(name, job, memory)


def cells_of(text: str, concurrency: Sequence[int]) -> Iterator[Cell]:
    """``NAME`` at every load of ``concurrency``, ``NAME@N,N...`` at its own. Raises :class:`InputError`."""
    name, own, levels = text.partition("@")
    if own and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", levels):
        raise InputError(f"--workload takes NAME or NAME@N,N... with N requests at once, got {text!r}")
    traffic = Traffic.named(name)
    yield from (Cell(traffic, users) for users in (map(int, levels.split(",")) if own else concurrency))


def option_of(text: str) -> tuple[str, Any]:
    """``name=value``, the value as JSON where it is some."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--stack: an option is NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    run_cli(main)
