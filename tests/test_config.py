import pytest

from llama_engine.config import EngineConfig
from llama_engine.errors import InputError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_seq_len": -1}, "max_seq_len"),
        ({"tokens_per_block": 48}, "power of two"),
        ({"max_num_tokens": 2}, "max_num_tokens"),
        ({"max_prefill_tokens": 0}, "max_prefill_tokens"),
        ({"kv_cache_free_gpu_memory_fraction": 0}, "fraction"),
        ({"lm_head": "fp4"}, "lm_head"),
        ({"enable_prefix_cache": 1}, "enable_prefix_cache must be a bool"),
    ],
)
def test_bad_engine_settings_are_named(change, message):
    with pytest.raises(InputError, match=message):
        EngineConfig(**change)


def test_unknown_keys_are_refused():
    with pytest.raises(InputError, match="paged"):
        EngineConfig.from_dict({"paged": True})
