"""vLLM as a stack, over a stand-in of the calls that 0.25.1 answered on a CPU: whole answers, stamped step by step."""

import importlib.util
import json
import sys

import pytest

from llama_engine.measure.peers import open_peer
from llama_engine.measure.stack_worker import StackProcess
from llama_engine.sampling import SamplingParams

# Two tokens a step for each request, and the last of them alone: what it hands out are deltas.
STANDIN = """
from types import SimpleNamespace as Bag

__version__ = "0.25.1"


class SamplingParams:
    def __init__(self, max_tokens, ignore_eos, detokenize, output_kind, temperature, top_p=1.0, top_k=0):
        assert ignore_eos and not detokenize and output_kind is vllm.sampling_params.RequestOutputKind.DELTA
        self.max_tokens, self.drawn = max_tokens, (temperature, top_p, top_k)


class LLM:
    def __init__(self, model, *, gpu_memory_utilization, skip_tokenizer_init, enable_prefix_caching, **more):
        assert skip_tokenizer_init
        self.llm_engine, self.left, self.asked = self, {}, []
        self.seen = [gpu_memory_utilization, enable_prefix_caching, more]

    def add_request(self, name, prompt, params):
        assert isinstance(name, str) and name not in self.left
        self.left[name] = [params.max_tokens, len(prompt["prompt_token_ids"])]
        self.asked.append(params.drawn)

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        outputs = []
        for name, (count, first) in list(self.left.items()):
            ids = [first] * min(2, count)
            self.left[name][0] -= len(ids)
            if not self.left[name][0]:
                del self.left[name]
            outputs.append(Bag(request_id=name, outputs=[Bag(token_ids=tuple(ids))]))
        return outputs[::-1]


import vllm.sampling_params
"""


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    home = tmp_path / "site"
    (home / "vllm").mkdir(parents=True)
    (home / "vllm/__init__.py").write_text(STANDIN)
    (home / "vllm/sampling_params.py").write_text("import enum\nRequestOutputKind = enum.Enum('R', 'DELTA FINAL')\n")
    monkeypatch.syspath_prepend(home)
    for name in ("vllm", "vllm.sampling_params"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield home
    for name in ("vllm", "vllm.sampling_params"):
        sys.modules.pop(name, None)


def test_every_answer_is_whole_and_its_own(vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    peer = open_peer("vllm", tmp_path, "cpu", True, 0.5, {"max_num_seqs": 8, "quantization": "fp8"})
    assert (peer.most, peer.engine.seen) == (8, [0.45, True, {"max_num_seqs": 8, "quantization": "fp8"}])
    assert peer.about["version"] == "0.25.1"
    assert peer.about["variables"]["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    runs = peer.generate_batch([[1, 2, 3], [4]], [5, 2], None)
    assert [run.token_ids for run in runs] == [[3] * 5, [1] * 2]
    assert [len(set(run.token_times)) for run in runs] == [3, 1]  # a stamp a step
    assert runs[0].t0 == runs[1].t0 <= runs[1].token_times[0]
    peer.generate_batch([[1]], [1], SamplingParams(temperature=0.8, top_p=0.95))
    assert peer.engine.asked == [(0.0, 1.0, 0)] * 2 + [(0.8, 0.95, -1)]


def test_it_plays_in_a_tournament(vllm, run_script, tiny_engine, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(vllm))
    workload, output = tmp_path / "w.json", tmp_path / "t.json"
    workload.write_text('{"input_tokens": 8, "output_tokens": 4, "sampling": {"temperature": 0.8, "top_p": 0.95}}')
    stacks = ["--stack", f"ours=native:{tiny_engine}", "--stack", f"vllm:{tiny_model},max_model_len=64,max_num_seqs=2"]
    where = ["--model-dir", tiny_model, "--workload", f"{workload}@2,4", "--device", "cpu", "--output", output]
    done = run_script("benchmarks/tournament.py", *stacks, *where, "--prefix-cache")
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert [(x["contestant"], x["concurrency"]) for x in result["levels"]] == [("ours", 2), ("vllm", 2), ("ours", 4)]
    assert result["levels"][1]["samples"]["output_tokens"] == [4] * 10
    assert {x["contestant"] for x in result["ratios"]} == {"vllm"}
    assert result["contestants"][1]["about"]["options"]["max_num_seqs"] == 2


def test_where_it_is_not_installed_one_line_says_so(tmp_path):
    job = {"kind": "vllm", "path": str(tmp_path), "device": "cpu", "prefix_cache": False, "share": 1.0, "options": {}}
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    with pytest.raises(ValueError, match=r"vllm cannot be imported .* leave this stack out"):
        StackProcess(job)
