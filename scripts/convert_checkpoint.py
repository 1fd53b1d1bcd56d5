r"""Convert a Hugging Face Llama to a TensorRT-LLM unified checkpoint: INT8 or INT4 weight-only, FP8 row-wise, 16-bit.

Purpose: one checkpoint that both TensorRT-LLM and the native engine build from.
Method:  symmetric per-channel INT8 of every linear layer (max|w| / 128, half away from zero), packed in the byte
         order of the target GPU; or FP8 (e4m3), one scale a row (max|w| / 448), activations quantized per token at
         run time: by NVIDIA's recipe the MLP of all layers but the first and the last, or every linear layer, which
         the native engine alone runs. INT4 (--weight_only_precision int4) is TensorRT-LLM's with a scale a row
         (max|w| / 8); with --group_size the native engine's, a scale for every 64 or 128 inputs and
         activation-aware scaling (AWQ) over a text: a model without tokenizer is rounded as it is. With
         --kv_cache_dtype fp8 engines hold keys and values in e4m3, half the bytes. Rows stream from the shards, so
         memory stays small at any model size. --no-use_weight_only keeps 16 bits.
Output:  OUTPUT_DIR/config.json, rank{N}.safetensors, tokenizer files.

    python scripts/convert_checkpoint.py --model_dir models/smollm2-135m-instruct --output_dir checkpoints/smollm2 \
        --dtype float16 --use_weight_only --weight_only_precision int8
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from llama_engine.checkpoint.convert import FP8_RECIPES, ConvertOptions, convert
from llama_engine.checkpoint.packing import TARGET_ARCHES, visible_arch
from llama_engine.errors import InputError, run_cli
from llama_engine.flags import Parser
from llama_engine.model.schemes import GROUP_SIZES


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dtype", default="float16", help="float16 or bfloat16 (default: float16)")
    parser.add_argument(
        "--use_weight_only",
        action=argparse.BooleanOptionalAction,
        help="quantize the linear layers' weights (default: yes, unless --use_fp8_rowwise)",
    )
    parser.add_argument("--weight_only_precision", choices=["int8", "int4"], help="(default: int8)")
    parser.add_argument("--group_size", choices=["auto", *map(str, GROUP_SIZES)], help="of INT4: inputs a scale")
    parser.add_argument("--calibration_text", type=Path, help="of --group_size (default: a few lines of many kinds)")
    parser.add_argument("--use_fp8_rowwise", action="store_true", help="FP8 weights and activations (sm89 or later)")
    parser.add_argument("--fp8_recipe", choices=[*FP8_RECIPES], help="which matrices (default: nvidia; see above)")
    parser.add_argument(
        "--kv_cache_dtype", choices=["fp16", "fp8"], default="fp16", help="keys and values in an engine"
    )
    parser.add_argument("--target_arch", choices=["auto", *TARGET_ARCHES], help="default: the GPU, or without one sm80")
    parser.add_argument("--trtllm_version", help="whose byte layout or FP8 keys (default: 0.15.0)")
    parser.add_argument("--quantize_at_build", action="store_true", help="keep 16-bit weights; trtllm-build quantizes")
    parser.add_argument("--tp_size", type=int, default=1, help="tensor-parallel ranks, a GPU each (default: 1)")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT_DIR, if this script wrote it")
    args = parser.parse_args()

    weight_only = not args.use_fp8_rowwise if args.use_weight_only is None else args.use_weight_only
    if args.weight_only_precision and not weight_only:
        raise InputError("--weight_only_precision needs --use_weight_only")
    int4 = args.weight_only_precision == "int4"
    int8 = weight_only and not int4
    if args.group_size and not int4:
        raise InputError("--group_size needs --weight_only_precision int4")
    if args.calibration_text and not args.group_size:
        raise InputError("--calibration_text needs --group_size")
    if args.fp8_recipe and not args.use_fp8_rowwise:
        raise InputError("--fp8_recipe needs --use_fp8_rowwise")
    packed = (int8 and not args.quantize_at_build) or (int4 and not args.group_size)
    if not packed and (args.target_arch or (args.trtllm_version and not args.use_fp8_rowwise)):
        what = "FP8 has" if args.use_fp8_rowwise else "group-wise INT4 has" if int4 else "16-bit weights have"
        raise InputError(f"--target_arch and --trtllm_version choose the byte order of INT8: {what} none")
    arch = args.target_arch
    if packed and arch in (None, "auto"):
        seen, choices = visible_arch(), " or ".join(TARGET_ARCHES)
        if seen not in TARGET_ARCHES and (seen or arch):
            raise InputError(f"the visible GPU is {seen or 'none at all'}: give --target_arch {choices}")
        if not seen:
            print(f"no GPU is visible: packed for sm80 (native engines take any; for TensorRT-LLM give {choices})")
        arch = seen
    text = {}
    if args.calibration_text:
        try:
            text["calibration"] = args.calibration_text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--calibration_text {args.calibration_text} cannot be read as UTF-8: {error}") from None
    options = ConvertOptions(
        dtype=args.dtype,
        int8=int8,
        target_arch=arch or "sm80",
        trtllm_version=args.trtllm_version or "0.15.0",
        quantize_at_build=args.quantize_at_build,
        tp_size=args.tp_size,
        fp8=(args.fp8_recipe or "nvidia") if args.use_fp8_rowwise else None,
        int4=("group" if args.group_size else "channel") if int4 else None,
        group_size=int(args.group_size) if args.group_size not in (None, "auto") else None,
        kv_cache=args.kv_cache_dtype,
        **text,
    )
    start = time.perf_counter()
    convert(args.model_dir, args.output_dir, options, force=args.force)
    size = sum(path.stat().st_size for path in args.output_dir.glob("rank*.safetensors"))
    what = f"INT{4 if int4 else 8}, layout {options.layout.name}" if options.layout else "16-bit weights"
    what = f"FP8, {options.fp8} recipe" if options.fp8 else "INT4 in groups" if options.int4 == "group" else what
    print(f"{args.output_dir}: {size / 1e9:.2f} GB, {what}, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_cli(main)
