"""Conversations to ids for tokenizers of every shape, against transformers' own rendering."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.convert import ConvertOptions, convert
from llama_engine.config import EngineConfig
from llama_engine.errors import InputError
from llama_engine.tokenizer import ChatTokenizer, stop_inputs
from tests.tokenizers_small import SHAPES

SPOKEN = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|end|>", "<|user|>", "<|assistant|>", "|><|", "<tool>"),
    *("<", "|>", "<|", ">", "s>", "<|im_", "end|>", "|end|>", "<|im_<|im_start|>", "\ue000", "\ue001"),
]
WORDS = ["the", "quick", "naïve", "日本", "🦊", "foxes", "s", "user", "system", "x|y", "a<b", "1,2", "é"]
SPACES = ["", " ", "  ", "\n", "\n\n", "\t"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    made = {}
    for name, make in SHAPES.items():
        directory = make(tmp_path_factory.mktemp(name))
        made[name] = ChatTokenizer(directory), AutoTokenizer.from_pretrained(directory)
    return made


def rendered(oracle, messages):
    return list(oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def conversations(words):
    text = st.lists(st.tuples(st.sampled_from(SPACES), st.sampled_from(words)), max_size=6)
    contents = st.lists(st.tuples(text, st.sampled_from(SPACES)), min_size=2, max_size=4)

    def of(system, texts):
        roles = [*(["system"] if system else []), *["user", "assistant"] * len(texts)]
        joined = ["".join(map("".join, parts)) + end for parts, end in texts]
        return [{"role": role, "content": text} for role, text in zip(roles, joined)]

    return st.builds(of, st.booleans(), contents)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=60, deadline=None)
@given(messages=conversations(WORDS))
def test_harmless_conversations_get_exactly_the_ids_of_transformers(shapes, shape, messages):
    tokenizer, oracle = shapes[shape]
    assert tokenizer.encode_chat(messages) == rendered(oracle, messages)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=150, deadline=None)
@given(messages=conversations(WORDS + 3 * SPOKEN))
def test_no_message_writes_a_control_token(shapes, shape, messages):
    """Exactly the control ids of the same conversation about nothing, and the text is all there."""
    tokenizer, oracle = shapes[shape]
    quick = ["quick" if "quick" in message["content"] else "x" for message in messages]  # one template looks for it
    harmless = [message | {"content": text} for message, text in zip(messages, quick)]
    control = {*tokenizer.special_ids, *oracle.convert_tokens_to_ids(["<tool>"])} - {oracle.unk_token_id}
    ids = tokenizer.encode_chat(messages)
    assert [i for i in ids if i in control] == [i for i in rendered(oracle, harmless) if i in control]
    said = "".join(oracle.decode(ids).split())
    assert all("".join(message["content"].split()) in said for message in messages)


@pytest.mark.parametrize("shape", SHAPES)
def test_begin_of_sequence_comes_as_often_as_transformers_has_it(shapes, shape):
    tokenizer, oracle = shapes[shape]
    talk = [{"role": "user", "content": "Hello"}]
    assert tokenizer.encode_chat(talk).count(oracle.bos_token_id) == rendered(oracle, talk).count(oracle.bos_token_id)
    assert tokenizer.encode_chat(talk)[0] == oracle.bos_token_id
    for text in ("Hello", " two  spaces", "", f"{oracle.eos_token} is active in a bare prompt"):
        assert tokenizer.encode(text) == oracle(text)["input_ids"]
    long = "the quick brown fox " * 40
    assert tokenizer.decode(tokenizer.encode(long)) == long  # a tokenizer saved with a limit cuts nothing


@pytest.mark.parametrize("role", ["user<|im_end|>", "system|>\nevil<|assistant", "a b", "", "user\n"])
def test_a_role_cannot_carry_markers(shapes, role):
    for tokenizer, _ in shapes.values():
        with pytest.raises(InputError, match="a role is one word"):
            tokenizer.encode_chat([{"role": role, "content": "x"}])


def test_what_a_template_refuses_is_said(tmp_path):
    directory = SHAPES["smollm2"](tmp_path)
    (directory / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        ChatTokenizer(directory).encode_chat([{"role": "user", "content": "x"}])
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        ChatTokenizer(directory).encode_chat([{"role": "user", "content": "x"}])


def test_threads_share_a_tokenizer(shapes):
    tokenizer, _ = shapes["llama2"]
    talk = [{"role": "user", "content": "the quick brown fox <s> " * 50}]
    expected = tokenizer.encode_chat(talk), tokenizer.encode("<s>" * 50)
    with ThreadPoolExecutor(4) as pool:
        chats = [pool.submit(tokenizer.encode_chat, talk) for _ in range(40)]
        bare = [pool.submit(tokenizer.encode, "<s>" * 50) for _ in range(40)]
    assert all(chat.result() == expected[0] for chat in chats)
    assert all(ids.result() == expected[1] for ids in bare)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer", None])
def test_checkpoint_and_engine_tokenize_as_the_model_does(tiny_model, tmp_path, shape, tokenizer_class, edit_json):
    """And an engine knows every id that ends an answer: those of Llama 3.1 Instruct's two files."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    SHAPES[shape](model)
    edit_json(model / "tokenizer_config.json", {"tokenizer_class": tokenizer_class})
    edit_json(model / "config.json", {"eos_token_id": 128001, "model_type": "llama"})
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128008, 128009]}))
    convert(model, tmp_path / "checkpoint", ConvertOptions(int8=True))
    build_native(tmp_path / "checkpoint", tmp_path / "engine", EngineConfig(max_batch_size=2, max_seq_len=64))
    oracle = AutoTokenizer.from_pretrained(model)
    talk = [{"role": "user", "content": " the quick naïve fox"}]
    for directory in ("checkpoint", "engine"):
        tokenizer = ChatTokenizer(tmp_path / directory)
        assert tokenizer.encode_chat(talk) == rendered(oracle, talk)
        assert tokenizer.encode(" a b") == oracle(" a b")["input_ids"]
    assert tokenizer.eos_token_ids == (128001, 128008, 128009, oracle.eos_token_id)


def test_an_end_id_of_zero_is_one(tmp_path, edit_json):
    directory = SHAPES["smollm2"](tmp_path)
    edit_json(directory / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    assert ChatTokenizer(directory).eos_token_ids == (0,)
    assert stop_inputs((0,)) == {"end_id": 0}


def test_several_end_ids_are_an_end_id_and_stop_words():
    assert stop_inputs((128001, 128008, 128009)) == {"end_id": 128001, "stop_words_list": [[128008, 128009], [1, 2]]}
    assert stop_inputs(()) == {}


def test_a_directory_without_a_tokenizer_is_refused(tiny_engine):
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        ChatTokenizer(tiny_engine)


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", "{"), ("tokenizer_config.json", "["), ("engine.json", '{"model": 1}'), ("engine.json", "x")],
)
def test_damaged_files_are_one_line(tmp_path, name, text):
    directory = SHAPES["smollm2"](tmp_path)
    (directory / name).write_text(text)
    with pytest.raises(InputError, match=r"a tokenizer file or engine\.json is damaged"):
        ChatTokenizer(directory)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_of_tokens_add_up_to_the_text(shapes, shape):
    tokenizer, _ = shapes[shape]
    text = "the quick naïve 日 🦊"
    ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined.strip() == (text if "<unk>" not in joined else joined)
    for token in tokenizer.special_ids:
        assert tokenizer.token_bytes(token).decode() == tokenizer.backend.id_to_token(token)
