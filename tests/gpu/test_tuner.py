import json
from dataclasses import asdict

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.model.weights import random_weights

CONFIG = ModelConfig(64, 32, 64, 1, 2, 1, 16, 128)
ENGINE = EngineConfig(2, 64, 64, 16, num_kv_blocks=3)


def test_choices_survive_the_file_and_reach_the_kernels(device, tmp_path, monkeypatch):
    from llama_engine.gpu import tuner
    from llama_engine.gpu.chain import GpuModel
    from llama_engine.kernels import tiles
    from llama_engine.kernels.gemm import Tile

    model = GpuModel(CONFIG, ENGINE, random_weights(CONFIG, device), tiles.Tiles(None, ""))
    if device.type == "cpu":
        # The interpreter has neither graphs nor a clock worth reading: count the weight rows of a tile instead.
        steps = []

        def weight_rows(run):
            if not steps:  # one is enough to see that it runs
                steps.append(run())
            return sum(tile.n for tile in model.tiles._chosen.values())

        monkeypatch.setattr(tuner, "time_graph", weight_rows)
        monkeypatch.setattr(GpuModel, "run_linear", lambda *_: None)
    lines = []

    def choices(name, bucket, linear):
        return [Tile(max(8, min(bucket, 64)), n, 32) for n in (64, 16)]

    result = tuner.tune(model, lines.append, choices)
    assert set(result["tiles"]) == {
        f"{n}/int8/{b}" for n in ("qkv", "o", "gate_up", "down") for b in (8, 16, 32, 64, 128)
    }
    assert any("qkv" in line for line in lines)
    if device.type == "cpu":
        assert all(tile["n"] == 16 for tile in result["tiles"].values())
    (tmp_path / tiles.TUNING_FILE).write_text(json.dumps(result))
    stored = tiles.Tiles(tiles.load_tuning(tmp_path), tiles.gpu_name(device))
    linear = model.linears("qkv")[0]
    assert asdict(stored.get("qkv", linear, 5)) == result["tiles"]["qkv/int8/8"]
