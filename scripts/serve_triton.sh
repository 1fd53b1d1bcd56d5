#!/usr/bin/env bash
# Serve an engine with the real Triton Inference Server, on this machine only, until Ctrl-C.
#
#   ./scripts/serve_triton.sh --engine-dir engines/smollm2-135m-instruct
set -euo pipefail
scripts="$(cd "$(dirname "$0")" && pwd)"
source "$scripts/python.sh"
exec "$PY" "$scripts/serve_triton.py" "$@"
