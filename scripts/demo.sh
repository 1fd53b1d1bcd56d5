#!/usr/bin/env bash
# Chat with the INT8 engine in a browser and race it against the Hugging Face baseline. Sets itself up, makes the default
# model's engine if there is none, starts Triton Inference Server and the gateway, prints the address; Ctrl-C stops both.
#
#   ./scripts/demo.sh                              on this machine only, http://127.0.0.1:8080
#   ./scripts/demo.sh --model-dir DIR              a local Hugging Face Llama instead of the default model
#   ./scripts/demo.sh --port 9000 --device cpu     and any other option of llm_demo/server.py
set -euo pipefail
model_args=() server_args=()
while [ $# -gt 0 ]; do
  case ${1//_/-} in # both spellings, as in the Python scripts
    --model-dir) [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }; model_args=("$1" "$2"); shift ;;
    -h | --help) sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) server_args+=("$1") ;;
  esac
  shift
done
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

model=$("$PY" scripts/prepare_model.py "${model_args[@]}" | tail -n 1)
checkpoint=checkpoints/$(basename "$model") engine=engines/$(basename "$model")
if [ ! -e "$engine/engine.json" ]; then
  [ -e "$checkpoint/config.json" ] || ./scripts/convert_checkpoint.sh --model_dir "$model" --output_dir "$checkpoint"
  ./scripts/build_engine.sh --checkpoint_dir "$checkpoint" --output_dir "$engine" --backend native
fi
exec "$PY" llm_demo/server.py --engine-dir "$engine" --model-dir "$model" "${server_args[@]}"
