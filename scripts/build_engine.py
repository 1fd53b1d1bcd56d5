r"""Build an engine from a unified checkpoint: a TensorRT engine with trtllm-build, or a native engine.

Purpose: what benchmarks, Triton and the demo run.
Method:  native undoes the checkpoint's byte layout and stacks the matrices; tensorrt_llm runs trtllm-build with the
         same flags. auto takes tensorrt_llm where it is installed, else native, and says which.
Output:  OUTPUT_DIR with engine.json, the weights and the tokenizer.

    python scripts/build_engine.py --checkpoint_dir checkpoints/smollm2-135m-instruct \
        --output_dir engines/smollm2-135m-instruct --max_batch_size 16
"""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from llama_engine import trtllm
from llama_engine.build import build_native, prepare_machine
from llama_engine.checkpoint import Checkpoint
from llama_engine.config import EngineConfig
from llama_engine.errors import InputError, run_cli

ABLE = ("enable", "disable")
PLUGIN = ("auto", "float16", "bfloat16", "float32", "disable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--backend", choices=["auto", "native", "tensorrt_llm"], default="auto")
    parser.add_argument("--max_batch_size", type=int, default=16, help="sequences at once (default: 16)")
    parser.add_argument("--max_seq_len", type=int, help="prompt and answer (default: 2048, or the model's positions)")
    parser.add_argument("--max_num_tokens", type=int, help="tokens of one step (default: 2048; tensorrt_llm 8192)")
    parser.add_argument("--tokens_per_block", type=int, default=64, help="of the paged KV cache (default: 64)")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT_DIR")
    native = parser.add_argument_group("native only")
    native.add_argument("--lm_head", choices=["checkpoint", "int8"], help="precision of lm_head (default: checkpoint)")
    trt = parser.add_argument_group("tensorrt_llm only")
    trt.add_argument("--gemm_plugin", choices=PLUGIN)
    trt.add_argument("--gpt_attention_plugin", choices=PLUGIN)
    trt.add_argument("--use_paged_context_fmha", choices=ABLE)
    trt.add_argument("--use_fused_mlp", choices=ABLE)
    trt.add_argument("--dry-run", action="store_true", help="print the trtllm-build command and stop")
    args = parser.parse_args()

    backend = trtllm.pick_backend(args.backend)
    config = Checkpoint(args.checkpoint_dir).config
    max_seq_len = args.max_seq_len if args.max_seq_len is not None else min(2048, config.max_position_embeddings)
    sizes = {
        "max_batch_size": args.max_batch_size,
        "max_seq_len": max_seq_len,
        "tokens_per_block": args.tokens_per_block,
    }
    flags = {
        name: getattr(args, name)
        for name in ("gemm_plugin", "gpt_attention_plugin", "use_paged_context_fmha", "use_fused_mlp")
        if getattr(args, name) is not None
    }
    start = time.perf_counter()
    if backend == "native":
        if args.dry_run:
            raise InputError("--dry-run prints the trtllm-build command: give --backend tensorrt_llm with it")
        if flags:
            print(
                f"native backend; these apply to tensorrt_llm only: {' '.join(f'--{k} {v}' for k, v in flags.items())}"
            )
        max_num_tokens = args.max_num_tokens if args.max_num_tokens is not None else max(2048, args.max_batch_size)
        engine = EngineConfig(**sizes, max_num_tokens=max_num_tokens, lm_head=args.lm_head or "checkpoint")
        build_native(args.checkpoint_dir, args.output_dir, engine, force=args.force)
        for line in prepare_machine(args.output_dir):
            print(line)
    else:
        if args.lm_head == "int8":
            raise InputError("--lm_head int8 is a native option: TensorRT-LLM's W8A16 never quantizes lm_head")
        max_num_tokens = args.max_num_tokens if args.max_num_tokens is not None else 8192
        engine = EngineConfig(**sizes, max_num_tokens=max_num_tokens)
        if args.dry_run:
            print(shlex.join(trtllm.build_command(args.checkpoint_dir, args.output_dir, engine, flags)))
            return
        trtllm.build(args.checkpoint_dir, args.output_dir, engine, flags, force=args.force)
    size = sum(path.stat().st_size for path in args.output_dir.iterdir())
    print(f"{args.output_dir}: backend {backend}, {size / 1e9:.2f} GB, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_cli(main)
