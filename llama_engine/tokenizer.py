"""Messages and text to token ids, and back, with the files of an engine directory.

Needs transformers and its tokenizers library, not torch: Triton's text models import it beside either engine.

Control tokens (``<|im_start|>``, ``</s>``) are the template's to write. A message's text is tokenized as if they did
not exist: :meth:`ChatTokenizer.encode_chat` hides those a message spells, renders the template, finds the ones that
the template wrote, and tokenizes the whole with a copy of the tokenizer in which they bear names that nobody can
guess. All else - spaces beside a control token, prefix spaces, normalization - is the tokenizer's own doing.
"""

from __future__ import annotations

import inspect
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from llama_engine.errors import InputError

PRIVATE = [range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)]  # Unicode's private use areas
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of a byte-fallback vocabulary
# Byte-level vocabularies write printable bytes as themselves and the others, in order, from U+0100 on.
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)}
ROLE = re.compile(r"\w+")


class ChatTokenizer:
    """The tokenizer and chat template that lie in a directory.

    ``eos_token_ids`` are all ids that end an answer: those of ``engine.json``, then the tokenizer's own. Raises
    :class:`InputError` for a directory without a ``tokenizer.json`` and for damaged files. Methods may be called from
    any thread.
    """

    def __init__(self, directory: Path | str) -> None:
        directory = Path(directory)
        if not (directory / "tokenizer.json").is_file():
            raise InputError(f"{directory} has no tokenizer.json: give the directory of an engine that has one")
        from transformers import AutoTokenizer

        try:
            self._renderer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            engine_json = directory / "engine.json"
            engine = json.loads(engine_json.read_text("utf-8")) if engine_json.is_file() else {}
            listed = engine["model"]["eos_token_ids"] if engine else []
        except Exception as error:  # the libraries raise what they like
            raise InputError(f"{directory}: a tokenizer file or engine.json is damaged: {error}") from None
        self.backend: Tokenizer = self._renderer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        parameters = inspect.signature(self._renderer.apply_chat_template).parameters
        self._reserved = {*parameters, "messages"} - {"add_generation_prompt"}
        self.template: str = self._renderer.get_chat_template() if self._renderer.chat_template else ""
        self.pad_token_id: int | None = self._renderer.pad_token_id
        own = self._renderer.eos_token_id
        self.eos_token_ids = tuple(dict.fromkeys([*listed, *([] if own is None else [own])]))

        self.letter: int = self.backend.encode("a", add_special_tokens=False).ids[-1]  # some text, for what follows it

        added = self.backend.get_added_tokens_decoder()
        self._added = set(added)
        self._byte_level = "ByteLevel" in json.dumps(json.loads(self.backend.to_str())["decoder"])
        self.special_ids = {id for id, token in added.items() if token.special}
        nonce = secrets.token_hex(16)
        self._names = {
            token.content: f"{nonce}{id:08x}"
            for id, token in added.items()
            if token.special or _is_marker(token.content, self.template)
        }
        self._heads = {token[:n] for token in self._names for n in range(1, len(token))}
        self._tails = {token[n:] for token in self._names for n in range(1, len(token))}
        self._finder = Tokenizer(WordLevel({nonce: 0}, unk_token=nonce))  # finds added tokens and knows no others
        if self.backend.normalizer is not None:
            self._finder.normalizer = self.backend.normalizer
        self._finder.add_tokens(list(added.values()))
        self._plain = _renamed(self.backend, self._names)

    def encode(self, text: str) -> list[int]:
        """Ids of a bare prompt, as the model's tokenizer makes them: its control tokens are active and it adds its BOS.

        A prompt without a template is the caller's own to write, control tokens included, as in OpenAI's and vLLM's
        ``/v1/completions``.
        """
        return self.backend.encode(text).ids

    def encode_chat(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None, **options: Any
    ) -> list[int]:
        """Ids of a conversation up to where the answer begins; control tokens are the template's alone.

        ``tools`` and ``options`` are what the template may ask for. Raises :class:`InputError` when the model has no
        template or its template refuses these messages.
        """
        if not self.template:
            raise InputError("this model has no chat template: use /v1/completions")
        roles = [message["role"] for message in messages]
        if bad := [role for role in roles if not ROLE.fullmatch(role) or self._find(role)]:
            raise InputError(f"a role is one word of letters, digits and underscores, got {bad[0]!r}")
        if reserved := options.keys() & self._reserved:
            raise InputError(f"chat_template_kwargs may not set {sorted(reserved)[0]}")
        stand_ins = _StandIns([self.template, *self._names, *_strings([messages, tools, options])])
        contents = [{key: value for key, value in message.items() if key != "role"} for message in messages]
        hidden, tools, options = self._hide_all([contents, tools, options], stand_ins)
        hidden = [{"role": role, **content} for role, content in zip(roles, hidden)]
        options = {"add_generation_prompt": True} | options
        try:
            text = self._renderer.apply_chat_template(hidden, tools=tools, tokenize=False, **options)
        except Exception as error:  # a template refuses by raising what it likes
            raise InputError(f"the model's chat template refuses these messages: {error}") from None
        back = str.maketrans({stand_in: char for char, stand_in in stand_ins.items()})
        parts, done = [], 0
        for start, end, content in self._find(text):
            parts += [text[done:start].translate(back), self._names[content]]
            done = end
        parts.append(text[done:].translate(back))
        return self._plain.encode("".join(parts), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids; special tokens give nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, alone: part of a character, perhaps."""
        text = self.backend.id_to_token(token) or ""
        if token in self._added:
            return text.encode()
        if self._byte_level:
            return bytes(BYTES[char] for char in text)
        if BYTE.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    def _find(self, text: str) -> list[tuple[int, int, str]]:
        """Start, end and name of each control token in ``text``, with the spaces that the token takes in."""
        found = self._finder.encode(text, add_special_tokens=False)
        tokens = [(*span, self._finder.id_to_token(id)) for id, span in zip(found.ids, found.offsets)]
        return [token for token in tokens if token[2] in self._names]

    def _hide_all(self, value: Any, stand_ins: _StandIns) -> Any:
        """``value``, as JSON has it, with every string in it hidden."""
        if isinstance(value, str):
            return self._hide(value, stand_ins)
        if isinstance(value, list):
            return [self._hide_all(item, stand_ins) for item in value]
        if isinstance(value, dict):
            return {self._hide(key, stand_ins): self._hide_all(item, stand_ins) for key, item in value.items()}
        return value

    def _hide(self, text: str, stand_ins: _StandIns) -> str:
        """``text`` with a stand-in for a character of each control token, and at either end for one that could make a
        control token together with what the template puts beside it."""
        chars = list(text)
        while found := self._find("".join(chars)):
            for start, end, _ in found:
                at = next((i for i in range(start, end) if not chars[i].isspace()), start)
                chars[at] = stand_ins[chars[at]]
        text = "".join(chars)
        core = text.strip()  # as a template may
        first = len(text) - len(text.lstrip())
        sizes = range(1, max(map(len, self._heads), default=0) + 1)
        if any(core[:n] in self._tails for n in sizes):
            chars[first] = stand_ins[core[0]]
        if any(core[-n:] in self._heads for n in sizes):
            chars[first + len(core) - 1] = stand_ins[core[-1]]
        return "".join(chars)


class _StandIns(dict[str, str]):
    """For each character asked for, a private-use character that occurs in none of ``texts``."""

    def __init__(self, texts: Iterable[str]) -> None:
        seen = set().union(*texts)
        self._spare = (char for area in PRIVATE for char in map(chr, area) if char not in seen)

    def __missing__(self, char: str) -> str:
        stand_in = next(self._spare, None)
        if stand_in is None:
            raise InputError("the messages use every private-use character of Unicode: none is left")
        return self.setdefault(char, stand_in)


def _strings(value: Any) -> Iterator[str]:
    """Every string in ``value``, as JSON has it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(item)


def stop_inputs(ids: Sequence[int]) -> dict[str, Any]:
    """``ids`` as inputs of Triton's ``tensorrt_llm`` model: the first is ``end_id``, the others are words of one token
    in ``stop_words_list`` ``[2, n]``, flat ids over the words' end offsets."""
    if not ids:
        return {}
    end_id, *others = ids
    return {"end_id": end_id} | ({"stop_words_list": [others, [*range(1, len(ids))]]} if others else {})


def _is_marker(content: str, template: str) -> bool:
    """Whether an added token that is not declared special is one all the same: the template writes it, and it is
    neither space nor a word."""
    return content in template and re.search(r"[^\w\s]", content) is not None


def _renamed(tokenizer: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A copy in which some added tokens bear other names and keep their ids, and no text can be merged into them."""
    data = json.loads(tokenizer.to_str())
    data["post_processor"] = None
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): id for token, id in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint({*pair, "".join(pair)})]
    return Tokenizer.from_str(json.dumps(data))
