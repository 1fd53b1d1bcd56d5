import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_engine.tokenizer import ChatTokenizer
from llm_demo.text import TextStream
from tests.tokenizers_small import SHAPES


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


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stop_string_within_the_fewest_tokens_is_text(tokenizer, size):
    ids = tokenizer.encode("one two one two one two")
    assert len(ids) == 6  # a word each
    for fewest, expected in ((0, "one "), (1, "one "), (2, "one two one "), (5, "one two one two one "), (6, None)):
        stream, shown = TextStream(tokenizer, ["two"], fewest), ""
        for at in range(0, len(ids), size):
            shown += stream.push(ids[at : at + size])
            if stream.stopped:
                break
        assert stream.stopped == (expected is not None)
        assert shown == (expected or "one two one two one two")
    for fewest, stops in ((3, True), (4, False)):  # one that begins before and ends behind counts
        stream = TextStream(tokenizer, ["two one two"], fewest)
        assert stream.push(ids[:4]) == ("one " if stops else "one two one ")
        assert stream.stopped == stops


def test_a_beginning_of_a_stop_string_is_shown_when_the_text_ends(tokenizer):
    stream = TextStream(tokenizer, ["fox jumps"])
    shown = stream.push(tokenizer.encode("a quick fox"))
    assert shown == "a quick "
    assert stream.push([], last=True) == "fox"


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, tmp_path_factory):
    return ChatTokenizer(SHAPES[request.param](tmp_path_factory.mktemp(request.param)))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokenizer_add_up_to_the_whole_text(shape, data):
    """Leading spaces included, whatever special tokens, bytes and empty steps come between."""
    text = data.draw(st.text(st.sampled_from("the quick é日🦊\n "), max_size=30))
    ids = shape.backend.encode(text, add_special_tokens=False).ids
    for special in data.draw(st.lists(st.sampled_from(sorted(shape.special_ids)), max_size=3)):
        ids.insert(data.draw(st.integers(0, len(ids))), special)
    stream, pieces = TextStream(shape, []), []
    for token in ids:
        pieces += [stream.push([token]), stream.push([])]
    whole = shape.decode(ids)
    assert "".join(pieces) == whole  # nothing of it waits for the end
    assert "".join(pieces) + stream.push([], last=True) == whole
    assert stream.tokens == len(ids)


def test_every_word_brings_its_space(tmp_path):
    tokenizer = ChatTokenizer(SHAPES["llama2"](tmp_path))
    stream = TextStream(tokenizer, [])
    ids = [tokenizer.backend.token_to_id(token) for token in ("▁the", "▁world", "</s>", "▁the", "▁world")]
    assert [stream.push([token]) for token in ids] == ["the", " world", "", " the", " world"]


def test_text_goes_on_after_bytes_that_undo_a_character(tmp_path):
    """Byte fallback turns a whole run of bytes into replacement characters as soon as one of them fits nowhere."""
    tokenizer = ChatTokenizer(SHAPES["llama2"](tmp_path))
    tokens = ["<0xC3>", "<0xA9>", "<0xFF>", "▁the", "▁world"]
    stream = TextStream(tokenizer, [])
    pieces = [stream.push([tokenizer.backend.token_to_id(token)]) for token in tokens]
    assert pieces[:2] == ["", "é"]
    assert pieces[-1] == " world"
    assert "".join(pieces).endswith("the world")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_ids_break_the_stream(shape, data):
    """Bytes that are no character may be shown otherwise than in the whole, where later bytes change earlier ones."""
    ids = data.draw(st.lists(st.integers(0, shape.backend.get_vocab_size() - 1), max_size=60))
    stream = TextStream(shape, [])
    text = "".join(stream.push([token]) for token in ids) + stream.push([], last=True)
    whole = shape.decode(ids)
    if "\ufffd" not in whole:
        assert text == whole
