"""Clock arithmetic by hand, and the stacks on a tiny model."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_engine.config import ModelConfig
from llama_engine.errors import InputError, RunError
from llama_engine.measure import generation, protocol
from llama_engine.measure.cost import Cost
from llama_engine.measure.generation import GenerationRun
from llama_engine.measure.stacks import TensorRTStack, TransformersStack
from llama_engine.measure.telemetry import Telemetry


def test_times_by_hand():
    run = GenerationRun(10.0, [10.5, 10.7, 11.1], [1, 2, 3])
    assert run.ttft_s == pytest.approx(0.5)
    assert run.tpot_s == pytest.approx(0.3)
    assert run.latency_s == pytest.approx(1.1)
    assert run.itl_s == pytest.approx([0.2, 0.4])
    assert run.clock_backwards == 0
    assert GenerationRun(10.0, [9.0, 11.0, 10.0]).clock_backwards == 2


def test_costs_by_hand():
    config = ModelConfig(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1, head_size=2,
        max_position_embeddings=64,
    )  # fmt: skip
    cost = Cost.of(config, weight_nbytes=1000, kv_nbytes_per_token=10)
    assert cost.flop_per_token == 2 * 2 * (4 * 8 + 4 * 4 + 3 * 4 * 6)
    assert cost.decode_nbytes(32, 16) == 1000 + 10 * 40
    assert cost.decode_nbytes(32, 16, batch=3) == 1000 + 3 * 10 * 40
    ceilings = {"read_bandwidth": {"bytes_per_s": 2000.0}, "matmul": {"flop_per_s": 1e6}}
    assert generation.mbu(1400, 1.0, ceilings) == pytest.approx(0.7)
    assert generation.mfu(cost, 10, 0.01, ceilings) == pytest.approx(cost.flop_per_token * 10 / 0.01 / 1e6)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, eos_token_id=list(range(64)),
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(path)
    return path


def test_the_baseline_ignores_eos_and_gives_exactly_n_tokens(model_dir):
    """Every id is an EOS here, so a stack that honours EOS stops after one token."""
    stack = TransformersStack(model_dir)
    run = stack.generate([1, 2, 3], 7)
    assert len(run.token_ids) == len(run.token_times) == 7
    assert run.t0 < run.token_times[0] <= run.token_times[-1]
    with torch.inference_mode():
        ids = torch.tensor([[1, 2, 3]])
        for token in run.token_ids:
            assert int(stack.model(ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    tied_out = stack.model.get_input_embeddings().weight.nbytes
    assert stack.cost.weight_nbytes == sum(p.nbytes for p in stack.model.parameters()) - tied_out


def test_the_compiled_baseline_gives_the_eager_ones_tokens_from_a_static_cache(tiny_model, monkeypatch):
    compiled, eager = [], TransformersStack(tiny_model)

    def compile_nothing(forward):
        def counted(*args, **options):
            compiled.append(type(options["past_key_values"]).__name__)
            return forward(*args, **options)

        counted.__signature__ = inspect.signature(forward)  # generate reads which inputs the model takes
        return counted

    monkeypatch.setattr(torch, "compile", compile_nothing)
    stack = TransformersStack(tiny_model, compiled=True)
    prompt = [5, 9, 33, 2, 70]
    assert stack.generate(prompt, 6).token_ids == eager.generate(prompt, 6).token_ids
    assert compiled == ["StaticCache"] * 6


@pytest.mark.parametrize(
    ("version", "keyword"),
    [("4.46.3", "torch_dtype"), ("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), ("5.0.0rc1", "dtype")],
)
def test_each_transformers_release_gets_the_dtype_by_the_name_it_knows(model_dir, monkeypatch, version, keyword):
    given = {}

    def from_pretrained(_, **options):
        given.update(options)
        return LlamaForCausalLM(LlamaConfig.from_pretrained(model_dir))

    monkeypatch.setattr("transformers.__version__", version)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    TransformersStack(model_dir)
    assert given == {keyword: torch.bfloat16, "attn_implementation": "sdpa"}


class FakeStack:
    cost = Cost(1, 1, 1.0)

    def __init__(self, name, log, tokens=2):
        self.name, self.log, self.tokens = name, log, tokens

    def generate(self, prompt_ids, new_tokens):
        self.log.append((self.name, new_tokens))
        return GenerationRun(0.0, [1.0 + i for i in range(self.tokens)], list(range(self.tokens)))


def test_runs_are_interleaved_after_warmup():
    log = []
    stacks = [FakeStack("a", log), FakeStack("b", log)]
    with Telemetry() as telemetry:
        timed = generation.run_interleaved(stacks, [1], 9, warmup=1, runs=2, telemetry=telemetry)
    wake = generation.WAKE_TOKENS
    assert log == [("a", 9), ("b", 9)] + [("a", wake), ("a", 9), ("b", wake), ("b", 9)] * 2
    assert {name: len(runs) for name, runs in timed.items()} == {"a": 2, "b": 2}
    with Telemetry() as telemetry, pytest.raises(RunError, match="no tokens"):
        generation.run_interleaved([FakeStack("a", log, 0)], [1], 2, warmup=0, runs=1, telemetry=telemetry)


def test_an_executors_tokens_are_stamped_as_they_come():
    def stream(prompt, new_tokens):
        yield from ([3], [4, 5])  # a step may bring several tokens

    stack = TensorRTStack(SimpleNamespace(stream=stream), Cost(1, 1, 1.0), {})
    run = stack.generate([0, 1, 2], 3)
    assert run.token_ids == [3, 4, 5]
    assert run.token_times[0] < run.token_times[1] == run.token_times[2]


def test_prompts_have_the_exact_length_and_differ(model_dir):
    prompts = generation.make_prompts(model_dir, "ignored: no tokenizer", 32, 8)
    assert [len(prompt) for prompt in prompts] == [32] * 8
    assert len({tuple(prompt) for prompt in prompts}) == 8
    with pytest.raises(InputError, match="input-tokens"):
        generation.make_prompts(model_dir, "", 0)


def paired(baseline_s, engine_s):
    def one(benchmark, backend, seconds):
        samples = {"latency_s": seconds, "ttft_ms": seconds, "tpot_ms": seconds, "output_tokens": [2] * len(seconds)}
        return {
            "benchmark": benchmark, "backend": backend, "model": {}, "environment": {}, "samples": samples,
            "workload": {"output_tokens": 2}, "validity": generation_validity(samples),
        }  # fmt: skip

    return protocol.comparison(one("baseline", "transformers", baseline_s), one("optimized", "native", engine_s))


def generation_validity(samples):
    from llama_engine.measure.validity import judge

    return judge({"workload": {"output_tokens": 2}, "samples": samples})


def test_comparison_divides_only_valid_runs():
    good = paired([2.0] * 5, [1.0] * 5)
    assert good["speedup"]["latency"] == {"ratio": 2.0, "ci95": [2.0, 2.0], "verdict": "faster"}
    assert good["speedup"]["output_tokens_per_s"]["ratio"] == 2.0
    bad = paired([2.0] * 4, [1.0] * 5)
    assert bad["speedup"] == {}
    assert bad["validity"]["status"] == "INVALID"
    assert "baseline: 4 timed runs" in bad["validity"]["reasons"][0]
