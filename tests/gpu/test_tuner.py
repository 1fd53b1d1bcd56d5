import json
from dataclasses import asdict

import pytest
import triton

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.model.schemes import INT8
from llama_engine.model.weights import random_weights

CONFIG = ModelConfig(64, 32, 64, 1, 2, 1, 16, 128)
ENGINE = EngineConfig(2, 64, 64, 16, num_kv_blocks=3)
NAMES = ("gate_up", "down", "qkv", "o")  # as they are tuned


@pytest.fixture
def model(device):
    from llama_engine.gpu.chain import GpuModel
    from llama_engine.kernels import tiles

    return GpuModel(CONFIG, ENGINE, random_weights(CONFIG, device), tiles.Tiles(None, ""))


def choices(name, bucket, linear):
    from llama_engine.kernels.gemm import Tile

    return [Tile(max(8, min(bucket, 64)), n, 32) for n in (64, 128, 16)]


def read_back(model, result, folder):
    """The tile of 8 rows of qkv, from the file that the engine directory would hold."""
    from llama_engine.kernels import tiles

    (folder / tiles.TUNING_FILE).write_text(json.dumps(result))
    stored = tiles.Tiles(tiles.load_tuning(folder), tiles.gpu_name(model.device))
    return asdict(stored.get("qkv", model.linears.named("qkv")[0], 5))


@pytest.mark.gpu
def test_tiles_of_every_bucket_are_timed_and_survive_the_file(model, tmp_path):
    from llama_engine.gpu import tuner

    lines = []
    result = tuner.tune(model, lines.append, choices)
    assert set(result["tiles"]) == {f"{n}/int8/{b}" for n in NAMES for b in (8, 16, 32, 64, 128)}
    assert any("qkv" in line for line in lines)
    assert read_back(model, result, tmp_path) == result["tiles"]["qkv/int8/8"]


def test_each_tile_is_timed_in_a_step_that_runs_it_beside_the_chosen_ones(model, tmp_path, monkeypatch):
    """Interpreted kernels, and a clock that sums the tiles' sizes which the step's products really had."""
    from llama_engine.gpu import tuner
    from llama_engine.kernels import gemm

    if model.device.type != "cpu":
        pytest.skip("where there is a real clock the test above uses it")
    product, steps = gemm.gemm, []
    name_of = {model.linears.named(name)[0].weight.data_ptr(): name for name in NAMES}

    def observed(a, a_scale, linear, out, rows, epilogue, tile, *more, **options):
        name = name_of.get(linear.weight.data_ptr())
        if name and options.get("compile_only") is not True:
            steps[-1][name] = tile.n
        if not options.pop("compile_only", False):  # the interpreter has no compiler to warm up
            product(a, a_scale, linear, out, rows, epilogue, tile, *more, **options)

    def clock(run):
        steps.append({})
        run()
        if 128 in steps[-1].values():
            raise triton.runtime.OutOfResources(1, 1, "shared memory")
        return sum(steps[-1].values())

    monkeypatch.setattr(gemm, "gemm", observed)
    monkeypatch.setattr(tuner, "time_graph", clock)
    monkeypatch.setattr(tuner, "ROW_BUCKETS", (8,))
    result = tuner.tune(model, choices=choices)
    assert {key: tile["n"] for key, tile in result["tiles"].items()} == {f"{name}/int8/8": 16 for name in NAMES}
    untuned = steps[0]["o"]
    for i, name in enumerate(NAMES):
        trials = steps[3 * i : 3 * i + 3]
        assert [step[name] for step in trials] == [64, 128, 16]
        assert all(step[other] == 16 for step in trials for other in NAMES[:i])
        assert all(step[other] == untuned for step in trials for other in NAMES[i + 1 :])
    assert read_back(model, result, tmp_path) == result["tiles"]["qkv/int8/8"]


def test_tiles_of_another_engine_are_taken_and_only_what_it_lacks_is_timed(model, tmp_path, monkeypatch):
    from llama_engine.gpu import tuner
    from llama_engine.kernels import tiles

    timed = []
    monkeypatch.setattr(tuner, "time_graph", lambda run: timed.append(1) or 1.0)
    monkeypatch.setattr(tuner, "ROW_BUCKETS", (8,))
    first = tuner.tune(model, choices=lambda *_: choices("", 8, None)[1:2])
    del first["tiles"]["down/int8/8"]
    (tmp_path / tiles.TUNING_FILE).write_text(json.dumps(first))
    stored = tiles.load_tuning(tmp_path)
    assert stored["tiles"] == first["tiles"]
    with pytest.warns(match="another GPU"):
        elsewhere = tiles.Tiles(stored, "another GPU")
    assert not elsewhere.chosen("qkv", INT8, 8)
    model.linears.tiles = tiles.Tiles(stored, tiles.gpu_name(model.device))
    timed.clear()
    again = tuner.tune(model, choices=choices)["tiles"]
    assert len(timed) == 3
    assert {key: tile["n"] for key, tile in again.items()} == {
        f"{name}/int8/8": 64 if name == "down" else 128 for name in NAMES
    }
