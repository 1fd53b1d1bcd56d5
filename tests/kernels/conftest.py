"""Kernel tests run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip(f"no kernels for {request.param} in this process")
    pytest.importorskip("triton")
    torch.manual_seed(0)
    return torch.device(request.param)
