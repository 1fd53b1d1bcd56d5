#!/usr/bin/env bash
# Serve an engine with the real Triton Inference Server, on this machine only, until Ctrl-C.
#
#   ./scripts/serve_triton.sh --engine-dir engines/smollm2-135m-instruct
set -euo pipefail
scripts="$(cd "$(dirname "$0")" && pwd)"
python="$scripts/../.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$scripts/serve_triton.py" "$@"
