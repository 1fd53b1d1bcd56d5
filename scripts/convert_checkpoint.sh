#!/usr/bin/env bash
# Convert a Hugging Face Llama to a TensorRT-LLM checkpoint, INT8 weight-only unless --use_fp8_rowwise is among the
# flags; all are passed on.
#
#   ./scripts/convert_checkpoint.sh --model_dir models/smollm2-135m-instruct --output_dir checkpoints/smollm2-135m-instruct
set -euo pipefail
scripts="$(cd "$(dirname "$0")" && pwd)"
source "$scripts/python.sh"
quantization=(--use_weight_only --weight_only_precision int8)
for flag in "$@"; do
    [[ $flag != --use_fp8_rowwise ]] || quantization=()
done
exec "$PY" "$scripts/convert_checkpoint.py" --dtype float16 ${quantization[@]+"${quantization[@]}"} "$@"
