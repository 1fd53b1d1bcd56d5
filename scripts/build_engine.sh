#!/usr/bin/env bash
# Build an engine from a checkpoint with the flags of the README; further flags are passed on, and win.
#
#   ./scripts/build_engine.sh --checkpoint_dir checkpoints/smollm2-135m-instruct --output_dir engines/smollm2-135m-instruct
set -euo pipefail
scripts="$(cd "$(dirname "$0")" && pwd)"
source "$scripts/python.sh"
exec "$PY" "$scripts/build_engine.py" --gemm_plugin auto --gpt_attention_plugin auto \
    --use_paged_context_fmha enable --use_fused_mlp enable --max_batch_size 16 "$@"
