"""Kernel tests run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import inspect
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llama_engine.cpu import fused


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip(f"no kernels for {request.param} in this process")
    pytest.importorskip("triton")
    torch.manual_seed(0)
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cpu_sampler(tmp_path_factory):
    library = fused.compile_library(tmp_path_factory.mktemp("kernels"))
    if library is None:
        pytest.skip("no C++ compiler")
    return fused.CpuSampler(library)


@pytest.fixture
def split(monkeypatch):
    """Sets how many programs share a row. Triton's interpreter runs programs one after another: here each has a thread,
    and goes on alone until it comes to an atomic operation."""
    from llama_engine.kernels import sampler, sampler_kernel

    monkeypatch.setattr(sampler, "WARPS", 1)
    monkeypatch.setattr(sampler, "PARTS", 4)
    monkeypatch.setattr(sampler, "CANDIDATES", 32)
    if torch.cuda.is_available():
        return lambda programs: monkeypatch.setattr(sampler, "SPLITS", programs)
    from triton.runtime import interpreter

    monkeypatch.setitem(globals(), "tl", sampler_kernel.tl)  # the interpreter looks for it beside the kernel
    running, atomic = threading.Lock(), interpreter.interpreter_builder.create_atomic_rmw

    def switch(*arguments):
        running.release()
        time.sleep(1e-6)
        running.acquire()
        return atomic(*arguments)

    def concurrent(self, fn, *rest):
        waiting = []

        def program(**arguments):
            waiting.append(pool.submit(alone, arguments))
            if len(waiting) == math.prod(self.grid):
                [done.result(timeout=300) for done in waiting]

        def alone(arguments):
            with running:
                fn(**arguments)

        pool = ThreadPoolExecutor(math.prod(rest[1]))
        program.__signature__, program.__annotations__ = inspect.signature(fn), fn.__annotations__
        start(self, program, *rest)

    start = interpreter.GridExecutor.__init__
    monkeypatch.setattr(interpreter.GridExecutor, "__init__", concurrent)
    monkeypatch.setattr(interpreter.interpreter_builder, "create_atomic_rmw", switch)
    return lambda programs: monkeypatch.setattr(sampler, "programs_per_row", lambda *_: programs)
