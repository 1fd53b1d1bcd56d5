"""The CUDA executor and the host's over the same weights, on a GPU or in Triton's interpreter."""

import torch

from llama_engine.checkpoint.packing import quantize
from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.cpu.executor import HostExecutor
from llama_engine.model.llama import TorchModel
from llama_engine.model.weights import Linear, random_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = ModelConfig(96, 64, 96, 2, 4, 2, 32, 128)
ENGINE = EngineConfig(max_batch_size=4, max_seq_len=64, max_num_tokens=64, tokens_per_block=16, num_kv_blocks=17)


def make_pair(config=TINY, engine=ENGINE, int8_head=False, **options):
    from llama_engine.gpu.executor import CudaExecutor

    weights = random_weights(config, DEVICE)
    if int8_head:
        weights.lm_head = Linear(*quantize(weights.lm_head.weight))
    host = HostExecutor(TorchModel(config, engine, weights), config, engine, weights)
    return CudaExecutor(config, engine, weights, **options), host


def blocks_of(slot, engine=ENGINE):
    n = engine.max_blocks_per_sequence
    return [1 + slot * n + i for i in range(n)]


def make_executor(config, weights):
    from llama_engine.gpu.executor import CudaExecutor

    return CudaExecutor(config, ENGINE, weights, kernels="streaming")
