#!/usr/bin/env bash
# Convert a Hugging Face Llama to a TensorRT-LLM checkpoint, INT8 weight-only unless the flags say otherwise; all are
# passed on to convert_checkpoint.py.
#
#   ./scripts/convert_checkpoint.sh --model_dir models/smollm2-135m-instruct --output_dir checkpoints/smollm2-135m-instruct
set -euo pipefail
scripts="$(cd "$(dirname "$0")" && pwd)"
source "$scripts/python.sh"
exec "$PY" "$scripts/convert_checkpoint.py" "$@"
