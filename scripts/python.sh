#!/usr/bin/env bash
# Sourced by the single-step scripts: sets $PY to the interpreter that setup.sh chose, else .venv's, else python3. Installs
# nothing and changes no directory.
_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}"
PY=${PY:-${LLAMA_ENGINE_PYTHON:-$_root/.venv/bin/python}}
command -v "$PY" > /dev/null || PY=python3
"$PY" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2> /dev/null || {
  echo "error: $PY has no PyTorch: run scripts/setup.sh first" >&2
  exit 2
}
