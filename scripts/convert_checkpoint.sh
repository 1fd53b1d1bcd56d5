#!/usr/bin/env bash
# Convert a Hugging Face Llama to an INT8 weight-only TensorRT-LLM checkpoint; further flags are passed on.
#
#   ./scripts/convert_checkpoint.sh --model_dir models/smollm2-135m-instruct --output_dir checkpoints/smollm2-135m-instruct
set -euo pipefail
scripts="$(cd "$(dirname "$0")" && pwd)"
source "$scripts/python.sh"
exec "$PY" "$scripts/convert_checkpoint.py" --dtype float16 --use_weight_only --weight_only_precision int8 "$@"
