#!/usr/bin/env bash
# Sourced by setup.sh and the single-step scripts: sets $PY to the interpreter that was asked for (PY, else
# LLAMA_ENGINE_PYTHON), else .venv's, else python3. Installs nothing and changes no directory.
_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PY=${PY:-${LLAMA_ENGINE_PYTHON:-}}
if [ -z "$PY" ]; then
  PY=$_root/.venv/bin/python
  [ -x "$PY" ] || PY=python3
fi
export PY PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}"
"$PY" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2> /dev/null || {
  echo "error: $PY is not a Python with PyTorch: run scripts/setup.sh first, or correct LLAMA_ENGINE_PYTHON" >&2
  unset PY
  return 2
}
