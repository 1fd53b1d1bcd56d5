"""Small tokenizers of the three shapes that Llama models come with, in directories as Hugging Face has them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = '<|begin_of_text|>' + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEXTS = ["the quick brown fox jumps over the lazy dog", "system user assistant", "Hello, world! Say yes.", "naïve café"]


def smollm2(target: Path) -> Path:
    """Byte-level BPE whose control tokens lie in its vocabulary, eos first; no BOS added; ChatML."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(specials)
    return _write(
        target, tokenizer, CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def llama3(target: Path) -> Path:
    """Byte-level BPE with control tokens above its vocabulary, BOS added by the post-processor and by the template."""
    tokenizer = _byte_level([])
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id")
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
    begin = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]} $B", special_tokens=[begin]
    )
    tokenizer.enable_truncation(64)  # as some are saved; a prompt is never cut
    return _write(target, tokenizer, LLAMA3, bos_token=begin[0], eos_token="<|eot_id|>")


def llama2(target: Path, *, normalizer: bool = False) -> Path:
    """SentencePiece-like BPE with byte fallback, a prefix space (``normalizer``: in the older way), BOS added twice."""
    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate(specials)}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "w"), ("o", "r"), ("▁w", "or"), ("l", "d"), ("▁wor", "ld")]
    merges += [("<", "s"), ("<s", ">")]  # a vocabulary's every pair, as a conversion finds them: text alone makes <s>
    for char in sorted({*"▁<>|[]/SYINT\n", *"".join(TEXTS).replace(" ", "")} - {"é"}):
        vocab.setdefault(char, len(vocab))
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return _write(target, tokenizer, LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def phi3(target: Path) -> Path:
    """Control tokens that take in the spaces beside them, one that overlaps another, one not declared special, a
    role's marker put together by the template, and ordinary added words."""
    tokenizer = _byte_level([])
    tokenizer.add_special_tokens(
        [
            AddedToken("<s>", rstrip=True),
            AddedToken("<|end|>", lstrip=True, rstrip=True, normalized=True),
            *(AddedToken(f"<|{role}|>", rstrip=True) for role in ("system", "user", "assistant")),
            AddedToken("|><|", normalized=False),
        ]
    )
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("foxes"), AddedToken("  ")])
    template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% if 'quick' in message['content'] %}{{ '<tool>' }}{% endif %}{% endfor %}{{ '<|assistant|>\n' }}"
    )
    return _write(target, tokenizer, template, bos_token="<s>", eos_token="<|end|>")


def unigram(target: Path) -> Path:
    """SentencePiece's other model, which makes ``<s>`` out of text by itself."""
    chars = sorted({*"▁<>|[]/SYINT\n", *"".join(TEXTS).replace(" ", "")} - {"é"})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [("▁the", -2.0), ("er", -3.0), *((char, -5.0) for char in chars)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _write(target, tokenizer, LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SHAPES = {
    "smollm2": smollm2,
    "llama2": llama2,
    "llama2-normalizer": lambda target: llama2(target, normalizer=True),
    "llama3": llama3,
    "phi3": phi3,
    "unigram": unigram,
}


def _byte_level(specials: list[str]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("e", "r"), ("u", "s"), ("us", "er"), ("i", "n"), ("Ã", "¯")]
    tokens = [*specials, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _write(target: Path, tokenizer: Tokenizer, template: str, **settings: str) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True, **settings}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    (target / "chat_template.jinja").write_text(template)
    return target
