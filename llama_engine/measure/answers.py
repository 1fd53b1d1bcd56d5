"""One answer of a served engine: from the events it arrived in to a time for each token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from llama_engine.measure.generation import GenerationRun
from llama_engine.measure.text import Text
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.target import Ask, Event


@dataclass
class ServedRun(GenerationRun):
    """One answered request; ``t0`` is its scheduled send time. ``usage`` is what the server counted, if it did."""

    input_tokens: int = 0
    text: str = ""
    usage: dict[str, int] | None = None
    think_s: float = 0.0
    ended_early: bool = False  # by itself, before the length asked for
    counted_by: str = "server"


def settle(run: ServedRun, events: Sequence[Event], ask: Ask, text: Text) -> None:
    """Give each token of an answer its time. Raises :class:`RequestFailed` for an answer of the wrong length.

    Where chunks do not say how many tokens they hold, the total comes from the server's usage, from the length asked
    for where the answer was cut there, or from the tokenizer, and goes to the chunks by characters: first and last
    token are exact then, the gaps between are those of chunks.
    """
    parts = [event for event in events if event.tokens or event.text]
    finish = next((event.finish for event in reversed(events) if event.finish), None)
    run.usage = next((event.usage for event in reversed(events) if event.usage), None)
    run.text = "".join(event.text for event in parts)
    if all(event.tokens is not None for event in parts):
        counts = [event.tokens or 0 for event in parts]
    else:
        if run.usage:
            total = run.usage["completion_tokens"]
        elif finish == "length":
            total, run.counted_by = ask.new_tokens, "length asked for"
        else:
            total, run.counted_by = len(text.codec.encode(run.text)), "tokenizer"
        counts = apportion(total, [len(event.text) for event in parts])
    for event, count in zip(parts, counts):
        run.token_times += [event.at] * count
        run.token_ids += event.ids
    run.input_tokens = (run.usage or {}).get("prompt_tokens") or run.input_tokens
    if not run.token_times:
        raise RequestFailed("an answer without a token")
    if (made := len(run.token_times)) != ask.new_tokens:
        run.ended_early = finish == "stop" and made < ask.new_tokens
        if not run.ended_early:
            raise RequestFailed(f"{made} tokens received, {ask.new_tokens} requested")


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """``total`` as whole numbers in proportion to ``weights``, first and last at least 1 if it is enough."""
    weights = weights if sum(weights) else [1] * len(weights)
    ends, last = [], len(weights) - 1
    for i, part in enumerate(itertools.accumulate(weights)):
        ends.append(min(max(1, round(total * part / sum(weights))), total - (i < last)) if total else 0)
    return [end - begin for begin, end in zip([0, *ends], ends)]
