"""A tokenizer for weights that never saw one: made-up words, so that a gateway has text to make of their tokens.

A byte-level vocabulary as Llama 3's is: ids 0 to 255 are the bytes, each further one is a space and letters. Without
merges text becomes bytes; any ids become text.
"""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_engine.files import write_json

SPACE = "Ġ"  # as byte-level vocabularies write it


def write_words(out: Path, vocab_size: int, eos: int) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json`` into ``out``; ``vocab_size`` is at least 256."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [SPACE + _letters(number) for number in range(vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens[eos]}
    write_json(out / "tokenizer_config.json", settings)


def _letters(number: int) -> str:
    """``number`` to the base 26, in two letters or more."""
    text = ""
    while number or len(text) < 2:
        number, digit = divmod(number, 26)
        text = string.ascii_lowercase[digit] + text
    return text
