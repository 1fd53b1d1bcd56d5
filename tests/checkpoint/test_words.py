import json

from llama_engine.checkpoint import prepare
from llama_engine.tokenizer import ChatTokenizer
from llm_demo.text import TextStream


def test_every_id_of_a_synthetic_vocabulary_has_text_of_its_own(tmp_path):
    model = prepare.prepare_synthetic("tiny", tmp_path, words=True)
    tokenizer = ChatTokenizer(model)
    assert tokenizer.backend.get_vocab_size() == json.loads((model / "config.json").read_text())["vocab_size"]
    words = [tokenizer.token_bytes(token) for token in range(512)]
    assert len(set(words)) == 512
    assert tokenizer.encode("héllo wörld") == [words.index(bytes([byte])) for byte in "héllo wörld".encode()]
    stream = TextStream(tokenizer, [])
    assert stream.push([300, 301, *tokenizer.encode("é")]) == (words[300] + words[301]).decode() + "é"
    assert prepare.prepare_synthetic("tiny", tmp_path, words=True) == model
    assert (model / "tokenizer.json").is_file()
    prepare.prepare_synthetic("tiny", tmp_path)  # asked for without: a model of its own again
    assert not (model / "tokenizer.json").is_file()
