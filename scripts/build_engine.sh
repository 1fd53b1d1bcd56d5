#!/usr/bin/env bash
# Build an engine from a checkpoint; all flags are passed on to build_engine.py.
#
#   ./scripts/build_engine.sh --checkpoint_dir checkpoints/smollm2-135m-instruct --output_dir engines/smollm2-135m-instruct
set -euo pipefail
scripts="$(cd "$(dirname "$0")" && pwd)"
source "$scripts/python.sh"
exec "$PY" "$scripts/build_engine.py" "$@"
