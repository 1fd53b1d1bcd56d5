r"""Build an engine from a unified checkpoint: a TensorRT engine with trtllm-build, or a native engine.

Purpose: what benchmarks, Triton and the demo run.
Method:  native undoes the checkpoint's byte layout and stacks the matrices; tensorrt_llm runs trtllm-build with the
         same flags. auto takes tensorrt_llm where it is installed, else native, and says which.
Output:  OUTPUT_DIR with engine.json, the weights and the tokenizer.

    python scripts/build_engine.py --checkpoint_dir checkpoints/smollm2-135m-instruct \
        --output_dir engines/smollm2-135m-instruct --max_batch_size 16
"""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path

from llama_engine import trtllm
from llama_engine.checkpoint.build import build_native
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.config import EngineConfig
from llama_engine.engine_dir import WEIGHTS, load_engine_json
from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.native import prepare_machine

ABLE = ("enable", "disable")
PLUGIN = ("auto", "float16", "bfloat16", "float32", "disable")
# trtllm-build's own flags: what they may be, the default first
TRT_FLAGS = dict.fromkeys(("gemm_plugin", "gpt_attention_plugin"), PLUGIN)
TRT_FLAGS |= dict.fromkeys(("use_paged_context_fmha", "use_fused_mlp"), ABLE)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--backend", choices=["auto", *WEIGHTS], default="auto")
    parser.add_argument("--max_batch_size", type=int, default=16, help="sequences at once (default: 16)")
    parser.add_argument("--max_seq_len", type=int, help="prompt and answer (default: 2048, or the model's positions)")
    parser.add_argument("--max_num_tokens", type=int, help="tokens of one step (default: 2048; tensorrt_llm 8192)")
    parser.add_argument("--tokens_per_block", type=int, default=64, help="of the paged KV cache (default: 64)")
    share = "of the GPU memory that is free at load, at most so much for the KV cache (default: 0.9)"
    parser.add_argument("--kv_cache_free_gpu_memory_fraction", type=float, default=0.9, help=share)
    parser.add_argument("--force", action="store_true", help="replace OUTPUT_DIR, if this script wrote it")
    own = parser.add_argument_group("native only")
    precisions = {"choices": ["checkpoint", "int8"], "default": "checkpoint"}
    own.add_argument("--lm_head", **precisions, help="precision of lm_head (default: checkpoint)")
    beside = "prompt tokens beside running answers, for each prompt that waits (default: 96; more: less even answers)"
    own.add_argument("--max_prefill_tokens", type=int, help=beside)
    like = "an engine of the same geometry: take its GPU tiles and time only those it lacks"
    own.add_argument("--tiles", type=Path, metavar="ENGINE_DIR", help=like)
    trt = parser.add_argument_group("tensorrt_llm only")
    for name, choices in TRT_FLAGS.items():
        trt.add_argument(f"--{name}", choices=choices, help=f"(default: {choices[0]})")
    trt.add_argument("--dry-run", action="store_true", help="print the trtllm-build command and stop")
    args = parser.parse_args()

    backend = trtllm.pick_backend(args.backend)
    native = backend == "native"
    source = Checkpoint(args.checkpoint_dir)
    if not native:
        trtllm.check_recipe(source)
    if args.tiles:
        other = load_engine_json(args.tiles, backend="native")
        if replace(other.model, name=source.config.name) != source.config or other.engine.tp_size != source.tp_size:
            raise InputError(f"--tiles: {args.tiles} is of another model, its tiles are for matrices of other shapes")
    positions = source.config.max_position_embeddings
    max_num_tokens = max(2048, args.max_batch_size) if native else 8192
    engine = EngineConfig(
        max_batch_size=args.max_batch_size,
        max_seq_len=min(2048, positions) if args.max_seq_len is None else args.max_seq_len,
        max_num_tokens=max_num_tokens if args.max_num_tokens is None else args.max_num_tokens,
        tokens_per_block=args.tokens_per_block,
        kv_cache_free_gpu_memory_fraction=args.kv_cache_free_gpu_memory_fraction,
        lm_head=args.lm_head,
        **({} if args.max_prefill_tokens is None else {"max_prefill_tokens": args.max_prefill_tokens}),
    )
    given = {name: value for name in TRT_FLAGS if (value := getattr(args, name)) is not None}
    flags = {name: given.get(name, choices[0]) for name, choices in TRT_FLAGS.items()}
    if native and args.dry_run:
        raise InputError("--dry-run prints the trtllm-build command: give --backend tensorrt_llm with it")
    if not native and args.lm_head == "int8":
        raise InputError("--lm_head int8 is a native option: TensorRT-LLM's W8A16 never quantizes lm_head")
    if not native and args.max_prefill_tokens is not None:
        raise InputError("--max_prefill_tokens is a native option: TensorRT-LLM's executor schedules by itself")
    if not native and args.tiles:
        raise InputError("--tiles is a native option: trtllm-build chooses its own kernels")
    if args.dry_run:
        print(shlex.join(trtllm.build_command(args.checkpoint_dir, args.output_dir, engine, flags)))
        return
    start = time.perf_counter()
    if native:
        if given:
            words = " ".join(f"--{name} {value}" for name, value in given.items())
            print(f"native backend; these apply to tensorrt_llm only: {words}")
        build_native(args.checkpoint_dir, args.output_dir, engine, force=args.force)
        print(*prepare_machine(args.output_dir, args.tiles), sep="\n")
    else:
        trtllm.build(args.checkpoint_dir, args.output_dir, engine, flags, force=args.force)
    size = sum(path.stat().st_size for path in args.output_dir.iterdir())
    print(f"{args.output_dir}: backend {backend}, {size / 1e9:.2f} GB, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_cli(main)
