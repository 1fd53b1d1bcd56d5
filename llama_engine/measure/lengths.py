"""How many tokens: fixed, or drawn from a distribution. Written the same way in a flag and in a workload's file."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from llama_engine.errors import InputError

FORMS = "N, LOW:HIGH, normal:MEAN:STD[:LOW:HIGH] or lognormal:MEDIAN:SIGMA[:LOW:HIGH]"
NUMBER = r"\d+\.?\d*"
SPOKEN = re.compile(rf"(normal|lognormal):({NUMBER}):({NUMBER})(?::(\d+):(\d+))?")
TAIL = 4.0  # standard deviations, where no HIGH is given


@dataclass(frozen=True)
class Length:
    """A token count in ``low .. high``: uniform, or of ``shape`` normal or lognormal with draws outside repeated.

    ``center`` and ``spread`` are mean and standard deviation, for lognormal the median and that of the logarithm.
    """

    low: int
    high: int
    shape: str = "uniform"
    center: float = 0.0
    spread: float = 0.0

    @classmethod
    def parse(cls, text: str | int, where: str = "--input-tokens and --output-tokens") -> Length:
        """One of :data:`FORMS`. Raises :class:`InputError`."""
        text = str(text)
        wrong = InputError(f"{where} take {FORMS}, 1 <= LOW <= HIGH, got {text!r}")
        if found := SPOKEN.fullmatch(text):
            shape, center, spread = found[1], float(found[2]), float(found[3])
            tail = center + TAIL * spread if shape == "normal" else center * math.exp(min(TAIL * spread, 20))
            low, high = int(found[4] or 1), int(found[5] or max(1, math.ceil(tail)))
            if not (1 <= low <= high and low <= center <= high):  # outside it nearly every draw would be repeated
                raise wrong
            return cls(low, high, shape, center, spread)
        low, _, high = text.partition(":")
        if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)):
            raise wrong
        return cls(int(low), int(high or low))

    def __str__(self) -> str:
        if self.shape != "uniform":
            return f"{self.shape}:{self.center:g}:{self.spread:g}:{self.low}:{self.high}"
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"

    @property
    def mean(self) -> float:
        """Of the distribution, before draws outside ``low .. high`` are repeated."""
        if self.shape == "uniform":
            return (self.low + self.high) / 2
        return self.center * (math.exp(self.spread**2 / 2) if self.shape == "lognormal" else 1)

    def draw(self, rng: random.Random) -> int:
        if self.shape == "uniform":
            return rng.randint(self.low, self.high)
        while True:
            if self.shape == "normal":
                value = rng.gauss(self.center, self.spread)
            else:
                value = self.center * math.exp(rng.gauss(0, self.spread))
            if self.low <= round(value) <= self.high:
                return round(value)
