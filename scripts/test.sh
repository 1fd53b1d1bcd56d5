#!/usr/bin/env bash
# Set up if needed, check style, run every test that this machine can run, as many at once as it has cores. Arguments go
# to pytest: -n 0 runs one after the other in one process.
set -euo pipefail
SETUP_DEV=1 source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PY" -m ruff check .
"$PY" -m ruff format --check .
exec "$PY" -m pytest -n auto "$@"
