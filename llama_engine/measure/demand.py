"""What is asked of a served engine: the flags of every script that loads one, as one checked value."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from llama_engine.errors import InputError
from llama_engine.measure.lengths import FORMS, Length
from llama_engine.measure.slo import NAMED, Limits
from llama_engine.measure.text import Text
from llama_engine.measure.traffic import Traffic
from llama_engine.sampling import SamplingParams


@dataclass(frozen=True)
class Demand:
    """What the clients ask of the server. ``concurrency`` and ``rate`` list the levels, closed loop and open loop.

    ``find`` is "" or by which of the two a search goes; ``replay`` how many times as fast as its trace. Raises
    :class:`InputError`.
    """

    traffic: Traffic
    concurrency: list[int]
    rate: list[float]
    replay: float = 0.0
    requests: int = 0
    duration: float = 0.0
    timeout: float = 600.0
    limits: Limits | None = None
    streaming: bool = True
    prefix_cache: bool = False
    stop_at_eos: bool = False
    seed: int = 0
    sweep: bool = False
    find: str = ""
    most: int = 256
    most_requests: int = 4000

    def __post_init__(self) -> None:
        levels = [*self.concurrency, *self.rate]
        positive = (*levels, self.timeout, self.most, self.most_requests)
        if not (
            all(0 < x < math.inf for x in positive)
            and all(0 <= x < math.inf for x in (self.requests, self.duration, self.replay))
        ):
            raise InputError(
                "--concurrency, --rate and --timeout must be positive, --requests and --duration not negative"
            )
        if self.replay and not self.traffic.trace:
            raise InputError("--replay needs a workload with a trace")
        if self.find and not self.limits:
            raise InputError("--find-goodput needs --slo")
        if not (levels or self.replay or self.sweep or self.find):
            raise InputError("nothing to measure: give --concurrency or --rate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that loads a server."""
    parser.add_argument(
        "--workload", help="a name in benchmarks/workloads/ or a JSON file; the flags below override it"
    )
    parser.add_argument("--concurrency", type=int, nargs="*", help="closed loop: users at once (default: 1 2 4 8)")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="open loop: requests a second")
    parser.add_argument("--replay", type=float, nargs="?", const=1.0, default=0.0, metavar="SPEED",
                        help="a trace's own arrivals, SPEED times as fast")  # fmt: skip
    parser.add_argument("--input-tokens", help=f"{FORMS} (default: 32)")
    parser.add_argument("--output-tokens", help="likewise (default: 128)")
    parser.add_argument("--temperature", type=float, help="above 0: sampled, each request with a seed of its own")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--requests", type=int, default=0, help="a level (default: 4 a user, or 32 in the open loop)")
    parser.add_argument("--duration", type=float, default=0, help="seconds a level, instead of --requests")
    parser.add_argument("--slo", nargs="*", default=[], metavar="LIMIT",
                        help=f"ttft_ms:200 tpot_ms:30 latency_ms:5000, or one of {', '.join(NAMED)}")  # fmt: skip
    parser.add_argument(
        "--attainment", type=float, help="share of requests that must meet them (default: 0.9, or theirs)"
    )
    parser.add_argument("--sweep", action="store_true", help="double the users until no more is gained")
    parser.add_argument("--find-goodput", nargs="?", const="rate", default="", choices=["rate", "concurrency"],
                        help="search the highest load that meets --slo")  # fmt: skip
    parser.add_argument("--most", type=int, default=256, help="users or requests/s that a sweep or search ends at")
    parser.add_argument("--most-requests", type=int, default=4000, help="of one trial of a search")
    parser.add_argument("--streaming", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--timeout", type=float, default=600, help="seconds the client waits for one answer")
    parser.add_argument("--prefix-cache", action="store_true", help="let the server answer from its prefix cache")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals")


def demand_of(args: argparse.Namespace, *, stop_at_eos: bool = False) -> Demand:
    """The flags above. Raises :class:`InputError`."""
    traffic = Traffic.named(args.workload) if args.workload else Traffic()
    changes: dict[str, Any] = {}
    for name in ("input_tokens", "output_tokens"):
        if getattr(args, name):
            changes[name] = Length.parse(getattr(args, name))
    if args.temperature is not None:
        drawn = SamplingParams(args.temperature, args.top_k, args.top_p, args.seed)
        changes["sampling"] = drawn if args.temperature > 0 else None
    if changes:
        traffic = dataclasses.replace(traffic, **changes)
    others = bool(args.rate or args.replay or args.sweep or args.find_goodput)
    concurrency = args.concurrency if args.concurrency is not None else [] if others else [1, 2, 4, 8]
    return Demand(
        traffic,
        concurrency,
        args.rate,
        args.replay,
        requests=args.requests,
        duration=args.duration,
        timeout=args.timeout,
        limits=Limits.parse(args.slo, args.attainment),
        streaming=args.streaming,
        prefix_cache=args.prefix_cache,
        stop_at_eos=stop_at_eos,
        seed=args.seed,
        sweep=args.sweep,
        find=args.find_goodput,
        most=args.most,
        most_requests=args.most_requests,
    )


def sampled(params: SamplingParams) -> dict[str, Any]:
    """What a level's workload says of its sampling."""
    return {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "seed")}


def workload_of(asked: Demand, text: Text, shared: float) -> dict[str, Any]:
    """``workload`` of a result; ``shared`` is the share of prompt tokens that had been sent before.

    ``input_tokens`` and ``output_tokens``, or their ranges, where every request has them.
    """
    traffic = asked.traffic
    said: dict[str, Any] = {name: getattr(asked, name) for name in ("streaming", "seed", "prefix_cache", "stop_at_eos")}
    said |= {"slo": asked.limits.limits if asked.limits else {}, "traffic": traffic.about(text, shared)}
    from_file = bool(traffic.trace or traffic.sharegpt)
    known = {"input_tokens": not (from_file or traffic.prefix_groups or traffic.turns.high > 1)}
    known["output_tokens"] = not (from_file or asked.stop_at_eos)
    for name in (name for name, fixed in known.items() if fixed):
        length = getattr(traffic, name)
        if length.low == length.high:
            said[name] = length.low
        elif length.shape == "uniform":
            said[f"{name}_range"] = [length.low, length.high]
    return said
