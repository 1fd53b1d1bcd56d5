import pytest

from llama_engine.errors import InputError
from llm_demo.text import ChatTokenizer, TextStream


@pytest.fixture(scope="module")
def tokenizer(smollm2_model):
    return ChatTokenizer(smollm2_model)


@pytest.mark.parametrize(
    "text", ["plain words, and more", "naïve café – 東京 👩\u200d👧 🦊🦊", " leading\n\n  space\t", "a"]
)
def test_text_comes_in_whole_characters_and_adds_up(tokenizer, text):
    stream, pieces = TextStream(tokenizer, []), []
    for token in tokenizer.encode(text):
        pieces.append(stream.push([token]))
    pieces.append(stream.push([], last=True))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_do_not_hold_the_text_back(tokenizer):
    first = tokenizer.encode("👩")[:1]
    assert "\ufffd" in TextStream(tokenizer, []).push(first * 12)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(("stop", "expected"), [(["lazy"], "The quick fox; the "), (["zzz", "; the"], "The quick fox")])
def test_nothing_of_a_stop_string_is_shown(tokenizer, size, stop, expected):
    stream, shown = TextStream(tokenizer, stop), ""
    ids = tokenizer.encode("The quick fox; the lazy dog")
    for at in range(0, len(ids), size):
        shown += stream.push(ids[at : at + size])
        assert expected.startswith(shown)
        if stream.stopped:
            break
    assert stream.stopped
    assert shown == expected


def test_a_beginning_of_a_stop_string_is_shown_when_the_text_ends(tokenizer):
    stream = TextStream(tokenizer, ["fox jumps"])
    shown = stream.push(tokenizer.encode("a quick fox"))
    assert shown == "a quick "
    assert stream.push([], last=True) == "fox"


def test_an_engine_without_a_tokenizer_is_refused(tiny_engine):
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        ChatTokenizer(tiny_engine)
