"""A model that answers at once, one response a token when streaming: what client and server can do without an engine.

``benchmarks/benchmark_triton.py`` measures its own ceiling against it.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch
import triton_python_backend_utils as pb_utils

FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL: the stub adds its own names only after this import


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.inbox: queue.SimpleQueue[tuple[Any, int, bool] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._answer_all, daemon=True)
        self.thread.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            inputs = {tensor.name(): torch.from_dlpack(tensor.to_dlpack()) for tensor in request.inputs()}
            streaming = "streaming" in inputs and bool(inputs["streaming"].item())
            self.inbox.put((request.get_response_sender(), int(inputs["request_output_len"].item()), streaming))

    def finalize(self) -> None:
        self.inbox.put(None)
        self.thread.join(timeout=10)

    def _answer_all(self) -> None:
        while (work := self.inbox.get()) is not None:
            sender, tokens, streaming = work
            for i in range(tokens if streaming else 1):
                count = 1 if streaming else tokens
                ids = pb_utils.Tensor.from_dlpack("output_ids", torch.zeros((1, 1, count), dtype=torch.int32))
                length = pb_utils.Tensor.from_dlpack("sequence_length", torch.full((1, 1), count, dtype=torch.int32))
                last = not streaming or i == tokens - 1
                sender.send(pb_utils.InferenceResponse([ids, length]), flags=FINAL if last else 0)
