#!/usr/bin/env bash
# Convert a Hugging Face Llama to an INT8 weight-only TensorRT-LLM checkpoint; further flags are passed on.
#
#   ./scripts/convert_checkpoint.sh --model_dir models/smollm2-135m-instruct --output_dir checkpoints/smollm2-135m-instruct
set -euo pipefail
scripts="$(cd "$(dirname "$0")" && pwd)"
python="$scripts/../.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$scripts/convert_checkpoint.py" --dtype float16 --use_weight_only --weight_only_precision int8 "$@"
