#!/usr/bin/env bash
# Set up if needed, check style, run every test that this machine can run. Arguments go to pytest.
set -euo pipefail
SETUP_DEV=1 source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
"$PY" -m ruff check .
"$PY" -m ruff format --check .
exec "$PY" -m pytest "$@"
