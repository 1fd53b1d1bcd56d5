r"""Load a Triton Inference Server over an engine of this repository and measure what its users get.

Purpose: throughput and latency of a served engine at several loads, with proof that the client is not the limit.
Method:  closed loop at each --concurrency, then open loop with seeded Poisson arrivals at each --rate; every request
         gets exactly its number of tokens, EOS ignored. A null model in the same server gives the client's own
         ceiling, and its lag is sampled; both decide validity. benchmarks/benchmark_server.py loads any other server.
Output:  results/<name>/triton-<backend>.json (-whole.json with --no-streaming) with one entry in "levels" a load.

With --url, --model-dir may take the engine directory's place: the model that the server runs, Hugging Face format.

    python benchmarks/benchmark_triton.py --engine-dir engines/smollm2-135m-instruct
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_engine.checkpoint.hf import HFModel, model_identity
from llama_engine.config import ModelConfig, check_length
from llama_engine.device import pick_device
from llama_engine.engine_dir import EngineInfo, load_engine_json
from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.measure import demand, served
from llama_engine.measure.cost import Cost
from llama_engine.measure.environment import ceilings, fingerprint
from llama_engine.measure.protocol import describe
from llama_engine.measure.result import check_output, write_result
from llama_engine.measure.text import Text, codec_of
from llama_engine.report.show import show
from llama_engine.serving.repository import ServeConfig
from llama_engine.serving.server import TritonServer, read_metrics
from llama_engine.serving.target import TritonTarget

OWN_PROCESSES = 3  # on the GPU: this one, tritonserver, the engine


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--engine-dir", type=Path, help="default: engines/smollm2-135m-instruct")
    parser.add_argument("--model-dir", type=Path, help="what NVIDIA's server at --url runs, if its engine is elsewhere")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--url", help="HOST:PORT of a running server (default: start one and stop it)")
    parser.add_argument("--metrics-url", default="127.0.0.1:8002", help="its metrics page, with --url")
    parser.add_argument("--protocol", choices=["grpc", "http"], default="grpc")
    demand.add_arguments(parser)
    parser.add_argument("--output", type=Path, help="default: results/local/triton-<backend>[-whole].json")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    engine = served_by(args.engine_dir, args.model_dir, args.url)
    asked = demand.demand_of(args)
    if engine.info:
        check_length(engine.info.engine, *asked.traffic.longest, "--output-tokens")
        engine.info.check_input(asked.traffic.longest[0], "--input-tokens")
    if engine.backend != "native" and runs_native(args.metrics_url):
        raise InputError(f"{args.url} runs the native engine: give --engine-dir, the one that it serves")
    name = f"triton-{engine.backend}{'' if args.streaming else '-whole'}.json"
    output = check_output(args.output or Path("results/local") / name, args.force, engine.dir)
    device = pick_device(args.device).type
    with served.console.status("measuring this machine's ceilings"):
        environment = fingerprint(device) | ceilings(device)
        if device == "cuda":
            torch.cuda.empty_cache()
    url, metrics_url = args.url, args.metrics_url
    with ExitStack() as stack:
        if not url:
            with served.console.status("starting Triton Inference Server"):
                config = ServeConfig(device=args.device, null_model=True, enable_prefix_cache=args.prefix_cache)
                triton = stack.enter_context(TritonServer(engine.dir, config))
            url = triton.grpc_url if args.protocol == "grpc" else triton.http_url
            metrics_url = f"{triton.host}:{triton.metrics_port}"
        work = served.measure(
            asked,
            lambda: TritonTarget(args.protocol, url),
            Text(codec_of([engine.dir], engine.model.vocab_size), asked.seed),
            environment,
            null=served.triton_null(args.protocol, url),
            metrics_url=metrics_url,
            own_processes=OWN_PROCESSES,
            model=engine.model,
            cost=engine.cost,
            about=lambda target, kernels: {
                "benchmark": "triton",
                "backend": engine.backend,
                "model": engine.identity,
                "engine": describe(engine.info, kernels) if engine.info else {"backend": engine.backend},
            },
        )
        result = asyncio.run(work)
    result["workload"]["protocol"] = args.protocol
    write_result(output, result, force=args.force)
    show([result])
    print(f"wrote {output}")
    return 0 if result["validity"]["status"] == "VALID" else 1


@dataclass(frozen=True)
class Served:
    """What the server runs, as known here. ``info`` is None where only the model is at hand, not the engine."""

    dir: Path
    backend: str
    model: ModelConfig
    identity: dict[str, str]
    info: EngineInfo | None = None

    @property
    def cost(self) -> Cost | None:
        """Of a TensorRT engine, whose server's metrics do not tell."""
        built = self.info and self.info.tensorrt_llm
        return Cost.of(self.model, built.step_nbytes, self.model.kv_nbytes()) if built else None


def served_by(engine_dir: Path | None, model_dir: Path | None, url: str | None) -> Served:
    """Of the engine's directory, or of the model's where NVIDIA's backend runs at ``url``. Raises
    :class:`InputError`."""
    if model_dir is None:
        engine_dir = engine_dir or Path("engines/smollm2-135m-instruct")
        info = load_engine_json(engine_dir, backend="auto")
        if info.backend != "native" and not url:
            raise InputError("NVIDIA's backend is not started here: run scripts/serve_triton.sh, and give --url")
        return Served(engine_dir, info.backend, info.model, info.identity, info)
    if engine_dir or not url:
        raise InputError("--model-dir takes the place of --engine-dir for a server that runs at --url")
    return Served(model_dir, "tensorrt_llm", HFModel(model_dir).config, model_identity(model_dir))


def runs_native(metrics_url: str) -> bool:
    """Whether the metrics page is one of an engine of this repository."""
    try:
        return "step_nbytes" in read_metrics(metrics_url)[0]
    except OSError:
        return False


if __name__ == "__main__":
    run_cli(main)
