#!/usr/bin/env bash
# Set up if needed, check style, run the tests, as many at once as there are cores. Arguments go to pytest: --slow adds
# those that kill servers or repeat in the large what a quick test shows, -n 0 runs one after the other in one process.
set -euo pipefail
SETUP_DEV=1 source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PY" -m ruff check .
"$PY" -m ruff format --check .
exec "$PY" -m pytest -n auto "$@"
