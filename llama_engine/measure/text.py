"""The text that prompts are cut from, as token ids: real prose by the model's tokenizer, random ids where it has none.

Every prompt begins with a number of its own, so that no two share a prefix unless a workload wants it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from llama_engine.errors import InputError

PROSE = Path(__file__).parents[2] / "benchmarks/data/alice.txt"
CHARACTERS = 4  # of English per token, where nobody can say


class Codec(Protocol):
    """What turns text into ids. ``about`` says in a result where the lengths come from."""

    about: str
    exact: bool  # whether a server would count the same tokens

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ModelTokenizer:
    """``tokenizer.json`` of a model's or an engine's directory; ids without the special tokens it would add."""

    about, exact = "tokens of the model's tokenizer", True

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{directory} has no tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class Pieces:
    """Pieces of four characters, for a server whose tokenizer is not at hand; what it counts, its usage says."""

    about, exact = f"estimated, {CHARACTERS} characters a token", False

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in re.findall(rf"(?s).{{1,{CHARACTERS}}}", text):
            if piece not in self._ids:
                self._ids[piece] = len(self._pieces)
                self._pieces.append(piece)
            ids.append(self._ids[piece])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[i] for i in ids if i < len(self._pieces))


class RandomIds:
    """For a model without a tokenizer: seeded ids of its vocabulary, which mean nothing."""

    about, exact = "random ids of the vocabulary", True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        rng = random.Random(text)
        return [rng.randrange(self.vocab_size) for _ in range(max(1, len(text) // CHARACTERS))]

    def decode(self, ids: Sequence[int]) -> str:
        raise InputError("this model has no tokenizer, so there is no text to send: ask it over --api triton")


class Text:
    """A stock of ids that prompts of any length are cut from. The same seed cuts the same prompts in the same order."""

    def __init__(self, codec: Codec, seed: int = 0, file: Path = PROSE) -> None:
        self.codec, self._seed = codec, seed
        try:
            self._ids = codec.encode(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is no text to cut prompts from: {error}") from None
        if not self._ids:
            raise InputError(f"{file} holds no tokens")
        self._count = self._epoch = 0

    def at(self, place: int) -> None:
        """Cut from here on what this stock cuts at ``place``, whatever it gave before."""
        self._count, self._epoch = place << 32, place

    def fresh(self) -> None:
        """From now on :meth:`named` gives other prompts: no load finds a prefix that an earlier one left in a cache."""
        self._epoch += 1

    @property
    def about(self) -> str:
        return self.codec.about

    def take(self, length: int) -> list[int]:
        """A prompt like no other before it: its number, then the text from a random place on."""
        self._count += 1
        return self._cut(f"{self._count} {self._seed}", length)

    def named(self, name: str, length: int) -> list[int]:
        """The same ``length`` ids each time that ``name`` is given, until :meth:`fresh`."""
        return self._cut(f"{name} {self._epoch} {self._seed}", length)

    def _cut(self, name: str, length: int) -> list[int]:
        head = self.codec.encode(f"{name}. ")
        at = random.Random(name).randrange(len(self._ids))
        return (head + [self._ids[(at + i) % len(self._ids)] for i in range(max(0, length - len(head)))])[:length]


class Prefixes:
    """Counts the prompt tokens that a perfect prefix cache could have known: whole blocks behind the same beginning."""

    BLOCK = 16  # tokens; the smallest in use

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.prompt_tokens = self.shared_tokens = 0

    def add(self, ids: Sequence[int]) -> int:
        """How many leading tokens of this prompt were sent before in another."""
        chain, shared = 0, 0
        for start in range(0, len(ids) - self.BLOCK + 1, self.BLOCK):
            chain = hash((chain, *ids[start : start + self.BLOCK]))
            shared += self.BLOCK * (chain in self._seen)
            self._seen.add(chain)
        self.prompt_tokens += len(ids)
        self.shared_tokens += shared
        return shared

    @property
    def share(self) -> float:
        return self.shared_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def codec_of(directories: Iterable[Path | None], vocab_size: int | None = None) -> Codec:
    """The tokenizer of the first directory that is given, else random ids of ``vocab_size``, else :class:`Pieces`."""
    for directory in directories:
        if directory is not None and (vocab_size is None or (directory / "tokenizer.json").is_file()):
            return ModelTokenizer(directory)
    return RandomIds(vocab_size) if vocab_size else Pieces()
