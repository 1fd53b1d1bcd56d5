"""A Triton server without an engine: random ids over gRPC, as fast as they are taken. What a gateway can carry.

``python -m llama_engine.serving.null_replica VOCAB TOKENS`` answers with so many ids a response; it prints its port,
and ends when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

SERVICE = "inference.GRPCInferenceService"
KINDS = 64  # different responses, made once


def response(ids: list[int], last: bool) -> bytes:
    """A message with ``output_ids`` ``[1, 1, n]``."""
    message = service_pb2.ModelStreamInferResponse()
    answer = message.infer_response
    answer.parameters["triton_final_response"].bool_param = last
    output = answer.outputs.add(name="output_ids", datatype="INT32")
    output.shape.extend([1, 1, len(ids)])
    answer.raw_output_contents.append(np.array(ids, np.int32).tobytes())
    return message.SerializeToString()


async def serve(vocab: int, tokens: int) -> None:
    rng = random.Random(0)
    ready = [response([rng.randrange(vocab) for _ in range(tokens)], False) for _ in range(KINDS)]

    async def answer(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
        async for data in requests:
            request = service_pb2.ModelInferRequest.FromString(data)
            inputs = dict(zip((tensor.name for tensor in request.inputs), request.raw_input_contents))
            left = int(np.frombuffer(inputs["request_output_len"], np.int32)[0])
            while left > tokens:
                left -= tokens
                yield ready[rng.randrange(KINDS)]
            yield response([0] * left, True)

    async def up(_: bytes, __: object) -> bytes:
        return service_pb2.ModelReadyResponse(ready=True).SerializeToString()

    server = grpc.aio.server()
    handlers = {
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(answer),
        "ModelReady": grpc.unary_unary_rpc_method_handler(up),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
