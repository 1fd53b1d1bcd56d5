r"""Load any served engine, whoever wrote it, and measure what its users get.

Purpose: figures of vLLM, SGLang, llama.cpp, trtllm-serve or ours by one clock and the definitions of docs/METRICS.md.
Method:  as benchmarks/benchmark_triton.py: closed loop, open loop, a trace's arrivals, a sweep, or a search for the
         highest load that meets --slo. Over OpenAI's API the server's own usage counts the tokens and --tokenizer (its
         model's directory) checks them; ignore_eos, token-id prompts and per-chunk counts are used where the server
         takes them, and the result lists what it refused. The key is read from the environment. A server that answers
         at once, in a process of its own, gives the client's ceiling.
Output:  results/local/served-<name>.json with one entry in "levels" a load; --csv FILE for a table of the levels.

    python benchmarks/benchmark_server.py --url http://127.0.0.1:8080 --tokenizer models/smollm2-135m-instruct
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from llama_engine.device import pick_device
from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure import demand, served
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.result import check_output, write_result
from llama_engine.measure.text import Text, codec_of
from llama_engine.report.show import show
from llama_engine.report.table import write_csv
from llama_engine.serving.openai_target import KEY_VARIABLE, OpenAITarget
from llama_engine.serving.target import TRITON_MODEL, Target, TritonTarget


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--url", required=True, help="http://HOST:PORT of an OpenAI API, HOST:PORT of Triton")
    parser.add_argument("--api", choices=["openai", "triton"], default="openai")
    parser.add_argument("--endpoint", choices=["completions", "chat"], default="completions", help="of OpenAI's API")
    parser.add_argument("--protocol", choices=["grpc", "http"], default="grpc", help="of Triton")
    parser.add_argument("--model", help=f"default: the first that the server lists; Triton: {TRITON_MODEL}")
    parser.add_argument("--tokenizer", type=Path, help="directory of the model's tokenizer.json")
    parser.add_argument("--key-variable", default=KEY_VARIABLE, help=f"holds the API key (default: {KEY_VARIABLE})")
    parser.add_argument("--extra-body", default="{}", help="JSON added to each request's body")
    parser.add_argument("--stop-at-eos", action="store_true", help="answers may end by themselves")
    parser.add_argument("--metrics-url", help="HOST:PORT of Triton's metrics page")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="to watch, where it is served"
    )
    demand.add_arguments(parser)
    parser.add_argument("--name", help="of the server, in the result (default: the API's)")
    parser.add_argument("--output", type=Path, help="default: results/local/served-<name>.json")
    parser.add_argument("--csv", type=Path, help="also write the levels as a table")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    asked = demand.demand_of(args, stop_at_eos=args.stop_at_eos)
    if args.api == "triton" and args.tokenizer is None:
        raise InputError("--api triton takes token ids: give --tokenizer, the directory of the model's tokenizer.json")
    json_object(args.extra_body)
    text = Text(codec_of([args.tokenizer]), asked.seed)
    name = args.name or args.api
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or args.api
    output = check_output(args.output or Path(f"results/local/served-{slug}.json"), args.force)
    if args.csv:
        check_output(args.csv, args.force or not args.csv.exists())
    work = served.measure(
        asked,
        lambda: open_target(args, text),
        text,
        fingerprint(pick_device(args.device).type),
        null=served.openai_null(text, args.endpoint == "chat") if args.api == "openai" else
        served.triton_null(args.protocol, args.url),
        metrics_url=args.metrics_url,
        about=lambda target, _: {
            "benchmark": "served",
            "backend": name,
            "model": {"name": target.model, "source": "unknown", "sha256": None},
        },
    )  # fmt: skip
    result = asyncio.run(work)
    write_result(output, result, force=args.force)
    show([result])
    print(f"wrote {output}")
    if args.csv:
        write_csv(args.csv, [result])
        print(f"wrote {args.csv}")
    return 0 if result["validity"]["status"] == "VALID" else 1


def open_target(args: Any, text: Text) -> Target:
    """The server that the flags name."""
    if args.api == "triton":
        return TritonTarget(args.protocol, args.url, args.model or TRITON_MODEL)
    return OpenAITarget(
        args.url,
        chat=args.endpoint == "chat",
        decode=text.codec.decode,
        ids=text.codec.exact,
        model=args.model,
        extra=json_object(args.extra_body),
        key_variable=args.key_variable,
    )


def json_object(text: str) -> dict[str, Any]:
    """A flag's JSON object. Raises :class:`InputError`."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"--extra-body takes a JSON object, got {text!r}")
    return found


if __name__ == "__main__":
    run_cli(main)
