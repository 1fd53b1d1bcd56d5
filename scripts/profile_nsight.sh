#!/usr/bin/env bash
# Profile baseline and engine with Nsight Systems and write profile.json: launches, API time, busy share, gaps, kernels.
# Without nsys, or without a GPU, PyTorch's profiler takes its place and the result says so.
#
#   ./scripts/profile_nsight.sh --model-dir models/NAME --engine-dir engines/NAME --output results/local/profile.json
#
#   --device DEVICE    auto, cpu or cuda        --output-tokens N    tokens to profile (64)
#   --keep DIR         keep the .nsys-rep and .sqlite files there    --force    replace an existing profile.json
set -euo pipefail
model=models/smollm2-135m-instruct engine=engines/smollm2-135m-instruct output=results/local/profile.json
device=auto tokens=64 keep= force=()
while [ $# -gt 0 ]; do
  case ${1//_/-} in # both spellings, as in the Python scripts
    --force) force=(--force) ;;
    -h | --help) sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    --model-dir | --engine-dir | --output | --device | --output-tokens | --keep)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      case ${1//_/-} in
        --model-dir) model=$2 ;;
        --engine-dir) engine=$2 ;;
        --output) output=$2 ;;
        --device) device=$2 ;;
        --keep) keep=$2 ;;
        *) tokens=$2 ;;
      esac
      shift
      ;;
    *) echo "error: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
# One token is the prefill's, and only what follows are decode steps.
[[ $tokens =~ ^([2-9]|[1-9][0-9]+)$ ]] || { echo "error: --output-tokens must be at least 2, got $tokens" >&2; exit 2; }
# Paths are the caller's, but python -c and -m shall not find modules there.
model=$(realpath -ms "$model") engine=$(realpath -ms "$engine") output=$(realpath -ms "$output")
[ -z "$keep" ] || keep=$(realpath -ms "$keep")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
# Whatever can be refused is refused before the first run.
device=$("$PY" -c 'import sys
from llama_engine import config, device as devices, engine_dir as engines, errors
from llama_engine.checkpoint import hf
from llama_engine.measure import result
model, engine_dir, output, force, tokens, device = sys.argv[1:]
def check():
    result.check_output(output, bool(force))
    hf.HFModel(model)
    info = engines.load_engine_json(engine_dir, backend="auto")
    config.check_request(info.model, info.engine, [0] * 32, int(tokens))
    print(devices.pick_device(device).type)
errors.run_cli(check)' "$model" "$engine" "$output" "${force[*]}" "$tokens" "$device")

find_nsys() {
  command -v nsys && return
  ls -d /opt/nvidia/nsight-systems/*/bin/nsys /opt/nvidia/nsight-systems/*/target-linux-x64/nsys \
    /usr/local/cuda*/bin/nsys {/opt/nvidia,/usr/local/cuda*}/nsight-compute*/host/target-linux-x64/nsys \
    /opt/nvidia/nsight-compute/*/host/target-linux-x64/nsys 2>/dev/null | sort -V | tail -n 1
}
nsys=$(find_nsys || true)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
arguments=(--model-dir "$model" --device "$device" --output-tokens "$tokens" --force)
run() { # run NAME [PREFIX...]: the NVTX script NAME, under PREFIX
  local name=$1 extra=()
  shift
  [ "$name" = baseline_nvtx ] || extra=(--engine-dir "$engine")
  "$@" "$PY" "benchmarks/$name.py" "${arguments[@]}" "${extra[@]}" --output "$work/$name.json" "${fallback[@]}"
}

if [ -n "$nsys" ] && [ "$device" = cuda ]; then
  # Nsight Compute ships nsys without the folder name under which it looks for its importer.
  host=$(dirname "$(dirname "$(readlink -f "$nsys")")")
  if [ ! -e "$host/host-linux-x64" ] && importer=$(ls -d "$host"/linux-desktop-*/QdstrmImporter 2>/dev/null | head -n 1); then
    ln -s "$(dirname "$importer")" "$host/host-linux-x64" 2>/dev/null ||
      echo "warning: cannot link $host/host-linux-x64; nsys may not find its importer" >&2
  fi
  fallback=() runs=()
  for name in baseline_nvtx trt_nvtx; do
    if ! {
      run $name "$nsys" profile --trace=cuda,nvtx --cuda-graph-trace=node --sample=none --cpuctxsw=none \
        --force-overwrite=true --output="$work/$name" &&
        { [ -e "$work/$name.nsys-rep" ] || "$host"/host-linux-x64/QdstrmImporter -i "$work/$name.qdstrm"; } &&
        "$nsys" export --type sqlite --force-overwrite=true --output="$work/$name.sqlite" "$work/$name.nsys-rep"
    } >"$work/$name.log" 2>&1; then
      tail -n 5 "$work/$name.log" >&2
      echo "error: nsys ($nsys) failed on $name; it needs libdw1 and libelf1 (apt-get install libdw1 libelf1)" >&2
      exit 1
    fi
    runs+=(--run "$work/$name.json:$work/$name.sqlite")
  done
  profiler="Nsight Systems $("$nsys" --version | grep -o '[0-9][0-9.]*' | head -n 1)"
  if [ -n "$keep" ]; then mkdir -p "$keep" && cp "$work"/*.nsys-rep "$work"/*.sqlite "$work"/*.json "$keep"; fi
else
  if [ "$device" = cuda ]; then
    echo "nsys was not found (install Nsight Systems: developer.nvidia.com/nsight-systems): using PyTorch's profiler" >&2
  fi
  fallback=(--torch-profiler) runs=()
  for name in baseline_nvtx trt_nvtx; do
    run $name env >"$work/$name.log" 2>&1 || { code=$?; tail -n 5 "$work/$name.log" >&2; exit $code; }
    runs+=(--run "$work/$name.json")
  done
  profiler="the PyTorch profiler (no $([ "$device" = cuda ] && echo nsys || echo GPU))"
fi
"$PY" -m llama_engine.measure.nsight "${runs[@]}" --profiler "$profiler" --output "$output" "${force[@]}"
