r"""Ask a served engine one question and print its answer.

Purpose: the smallest complete client; also a check that a server answers.
Method:  the question goes through the tokenizer and chat template of the engine directory, the ids over gRPC or HTTP.
Output:  the text, as it is made unless --no-streaming; timings on standard error. A server that was started with a
         secret in LLAMA_ENGINE_TRITON_KEY needs the same here.

    python benchmarks/triton_client.py --engine-dir engines/smollm2-135m-instruct \
        --prompt "What is the capital of France? Answer briefly."
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

from llama_engine.errors import RunError, run_cli
from llama_engine.flags import Parser
from llama_engine.serving.client import Client, connect
from llama_engine.tokenizer import ChatTokenizer, stop_inputs
from llm_demo.text import TextStream


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--engine-dir", type=Path, required=True, help="where the tokenizer lies")
    parser.add_argument("--prompt", default="What is the capital of France? Answer briefly.")
    parser.add_argument("--output-tokens", type=int, default=128, help="at most; the answer may end before")
    parser.add_argument("--no-chat-template", action="store_true", help="send the prompt's bare tokens")
    parser.add_argument("--streaming", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--protocol", choices=["grpc", "http"], default="grpc")
    parser.add_argument("--url", help="default: 127.0.0.1:8001 for gRPC, 127.0.0.1:8000 for HTTP")
    parser.add_argument("--wait", type=float, default=60, help="seconds the server gets to become ready (default: 60)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    asyncio.run(ask(args))


async def ask(args: argparse.Namespace) -> None:
    tokenizer = ChatTokenizer(args.engine_dir)
    if tokenizer.template and not args.no_chat_template:
        prompt = tokenizer.encode_chat([{"role": "user", "content": args.prompt}])
    else:
        prompt = tokenizer.encode(args.prompt)
    options = stop_inputs(tokenizer.eos_token_ids)
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "runtime_top_k": args.top_k, "runtime_top_p": args.top_p}
        options |= {"random_seed": args.seed}
    url = args.url or ("127.0.0.1:8001" if args.protocol == "grpc" else "127.0.0.1:8000")
    client = connect(args.protocol, url)
    try:
        await wait_ready(client, url, args.wait)
        t0, first, made, text = time.perf_counter(), 0.0, 0, TextStream(tokenizer, [])
        async for new in client.generate(prompt, args.output_tokens, streaming=args.streaming, **options):
            first = first or time.perf_counter()
            made += len(new)
            print(text.push([token for token in new if token not in tokenizer.eos_token_ids]), end="", flush=True)
    finally:
        await client.close()
    print(text.push([], last=True))
    took = time.perf_counter() - t0
    print(f"{made} tokens, first after {(first - t0) * 1e3:.1f} ms, all after {took * 1e3:.1f} ms", file=sys.stderr)


async def wait_ready(client: Client, url: str, seconds: float) -> None:
    """A server that was started a moment ago is still loading its engine."""
    started, told = time.monotonic(), False
    while not await client.ready():
        if not time.monotonic() - started < seconds:
            raise RunError(f"no server is ready at {url}: start one with scripts/serve_triton.sh, or give --url")
        if not told:
            print(f"waiting up to {seconds:g} s for the server at {url}", file=sys.stderr)
            told = True
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    run_cli(main)
