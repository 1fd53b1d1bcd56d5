#!/usr/bin/env bash
# Sourced by setup.sh and the single-step scripts: sets $PY to the interpreter that was asked for (PY, else
# LLAMA_ENGINE_PYTHON), else a python3 that has TensorRT-LLM (NVIDIA's container), else .venv's, else python3. Installs nothing
# and changes no directory.
_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PY=${PY:-${LLAMA_ENGINE_PYTHON:-}}
if [ -z "$PY" ]; then
  PY=$_root/.venv/bin/python
  if [ ! -x "$PY" ] || python3 -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("tensorrt_llm"))' 2> /dev/null; then
    PY=python3
  fi
fi
export PY PYTHONPATH="$_root${PYTHONPATH:+:$PYTHONPATH}"
"$PY" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2> /dev/null || {
  echo "error: $PY is not a Python with PyTorch: run scripts/setup.sh first, or correct LLAMA_ENGINE_PYTHON" >&2
  unset PY
  return 2
}
