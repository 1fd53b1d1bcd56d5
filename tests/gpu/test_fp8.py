"""FP8, INT4, 16-bit and mixed models in the GPU's chain, against the PyTorch reference."""

from dataclasses import replace

import pytest
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.cpu.executor import HostExecutor
from llama_engine.engine.step import Chunk, Step
from llama_engine.model.llama import TorchModel
from llama_engine.model.schemes import BF16, FP8, FP16, INT4, INT8
from llama_engine.model.weights import LINEARS, random_weights
from llama_engine.sampling import SamplingParams
from tests.repeats import quick

pytest.importorskip("triton")

TINY = ModelConfig(96, 64, 192, 3, 4, 2, 32, 128)
ENGINE = EngineConfig(max_batch_size=4, max_seq_len=64, max_num_tokens=64, tokens_per_block=16, num_kv_blocks=17)
KINDS = {"fp8": FP8, "int4": INT4, "fp16": FP16, "bf16": BF16, "nvidia": None, "mixed": None}


def weights_of(kind, config, device):
    """All layers of one scheme; NVIDIA's recipe; or a scheme a matrix, so that every form feeds every other."""
    if KINDS[kind]:
        return random_weights(config, device, scheme=KINDS[kind])
    schemes = [INT8, FP8, FP16, INT4]
    parts = {scheme: random_weights(config, device, scheme=scheme) for scheme in schemes}
    weights = parts[FP16]
    for i in range(config.num_layers):
        chosen = dict.fromkeys(("gate_up", "down"), FP8 if 0 < i < config.num_layers - 1 else FP16)
        if kind == "mixed":
            chosen = {name: schemes[(i + j) % 4] for j, name in enumerate(LINEARS)}
        changes = {name: getattr(parts[scheme].layers[i], name) for name, scheme in chosen.items()}
        weights.layers[i] = replace(weights.layers[i], **changes)
    return weights


def executors(kind, config, engine, device, **options):
    from llama_engine.gpu.executor import CudaExecutor

    weights = weights_of(kind, config, device)
    host = HostExecutor(TorchModel(config, engine, weights), config, engine, weights)
    fused = CudaExecutor(config, engine, weights, **options)
    n = engine.max_blocks_per_sequence
    for executor in (fused, host):
        for slot in range(engine.max_batch_size):
            executor.bind(slot, SamplingParams())
            executor.set_block_table(slot, [1 + slot * n + i for i in range(n)])
    return fused, host


def compare(fused, host, steps):
    """Where a sum's last bit falls otherwise, an e4m3 activation rounds to its neighbour, a sixteenth away."""
    for step in steps:
        got, want = fused.submit(step).logits(), host.submit(step).logits()
        assert got.shape == want.shape
        assert torch.nn.functional.cosine_similarity(got, want).min() > 0.95


PROMPTS = [[5, 9, 33, 2, 70], [1], list(range(20, 40))]
STEPS = [
    Step((Chunk(0, 0, PROMPTS[0]), Chunk(2, 0, PROMPTS[2][:7], samples=False)), "all"),
    Step((Chunk(0, 5, [4]), Chunk(2, 7, PROMPTS[2][7:]), Chunk(1, 0, PROMPTS[1])), "last"),
    Step((Chunk(2, 20, [8]), Chunk(0, 6, [3]), Chunk(1, 1, [7])), "last"),
]


@pytest.mark.parametrize("kind", quick(KINDS, "mixed"))
def test_ragged_steps_match_the_reference(device, kind):
    fused, host = executors(kind, TINY, ENGINE, device)
    compare(fused, host, STEPS)


@pytest.mark.parametrize("kind", quick(["fp8", "int4", "fp16", "mixed"], "mixed"))
def test_decode_steps_match_the_reference(device, kind):
    fused, host = executors(kind, TINY, ENGINE, device)
    compare(fused, host, STEPS[:1])
    for executor in (fused, host):
        executor.submit(Step((Chunk(1, 0, [17]),)))
    host._last[0], host._last[1] = (int(fused.model.last_token[slot]) for slot in (0, 1))
    compare(fused, host, [Step((Chunk(1, 1), Chunk(0, 5)), "last")])


@pytest.mark.parametrize("piece", quick([3, 4096], 3))
@pytest.mark.parametrize("kind", quick(["fp8", "fp16", "nvidia", "mixed"], "mixed"))
def test_the_librarys_products_take_their_place(device, kind, piece, monkeypatch):
    """cuBLAS stood in for by PyTorch where there is none; whole, and in pieces that use the same buffer again."""
    from llama_engine.gpu import linears
    from llama_engine.kernels import library, tiles
    from llama_engine.kernels.gemm import Tile

    called = []

    def matmul(a, a_scale, linear, out, scratch):
        called.append((len(linear.weight), len(a)))
        y = a.float() @ linear.weight.float().T
        out.copy_(y if a_scale is None else y * a_scale[:, None] * linear.scale)

    if device.type == "cpu":
        monkeypatch.setattr(library, "runs", lambda linear: linear.scheme in (FP8, FP16))
        monkeypatch.setattr(library, "matmul", matmul)
        monkeypatch.setattr(linears, "LIBRARY_ROWS", piece)
    usual = tiles.default_tile

    def always(name, rows, scheme, use_library):
        return Tile(library=True) if use_library and name != "lm_head" else usual(name, rows, scheme)

    monkeypatch.setattr(tiles, "default_tile", always)
    fused, host = executors(kind, TINY, ENGINE, device)
    compare(fused, host, STEPS)
    if device.type == "cpu":
        longest = max(rows for width, rows in called if width == 2 * TINY.intermediate_size)
        assert (longest == 3) == (piece == 3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8", "int4", "nvidia", "fp16"])
def test_graphs_equal_eager_and_match_the_reference_at_real_sizes(kind):
    config = ModelConfig(128256, 4096, 14336, 3, 32, 8, 128, 2048, rope_theta=500000.0)
    engine = EngineConfig(max_batch_size=96, max_seq_len=512, max_num_tokens=2048, num_kv_blocks=96 * 8 + 1)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, config.vocab_size, (300,), generator=generator).tolist()
    results = []
    for graphs in (True, False):
        fused, host = executors(kind, config, engine, torch.device("cuda"), graphs=graphs)
        step = Step((Chunk(2, 0, prompt),), "all")
        want, got = host.submit(step).logits(), fused.submit(step).logits()
        assert torch.nn.functional.cosine_similarity(got, want).min() > 0.95
        answers = [fused.submit(Step(tuple(Chunk(slot, 0, prompt[slot : slot + 9]) for slot in range(96)))).tokens()]
        answers += [fused.submit(Step(tuple(Chunk(s, 9 + i) for s in range(96)))).tokens() for i in range(8)]
        results.append(answers)
        del fused, host
        torch.cuda.empty_cache()
    assert results[0] == results[1]


def test_every_scheme_of_a_matrix_is_tuned(device, monkeypatch):
    from llama_engine.gpu import tuner
    from llama_engine.gpu.chain import GpuModel
    from llama_engine.kernels.gemm import Tile
    from llama_engine.kernels.tiles import Tiles

    model = GpuModel(TINY, ENGINE, weights_of("nvidia", TINY, device), Tiles(None, ""))
    if device.type == "cpu":
        monkeypatch.setattr(tuner, "time_graph", lambda run: 1.0)
        monkeypatch.setattr(GpuModel, "run_linear", lambda *_: None)
    tiles = tuner.tune(model, choices=lambda name, bucket, linear: [Tile(16, 32, 32)])["tiles"]
    assert {key for key in tiles if key.endswith("/8")} == {
        *("qkv/fp16/8", "o/fp16/8", "gate_up/fp16/8", "gate_up/fp8/8", "down/fp16/8", "down/fp8/8")
    }
