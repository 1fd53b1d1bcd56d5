#!/usr/bin/env bash
# The whole job: set up, prepare the model, convert, build, measure baseline against engine, serve and load-test through
# Triton Inference Server, draw the pictures, write the report. Results go to results/local/.
#
#   ./scripts/run_all.sh                                   the default model on this machine
#   ./scripts/run_all.sh --quick                           shorter and fewer runs
#   ./scripts/run_all.sh --device cuda --synthetic llama-3.1-8b --name my-gpu
#
#   --name NAME        publish into results/NAME          --model-dir DIR     a local Hugging Face Llama
#   --device DEVICE    auto, cpu or cuda                  --synthetic NAME    llama-3.1-8b, llama-3.2-1b, tiny
#   --lm-head P        checkpoint (16-bit) or int8        --headline          report into results/ itself
#   --schemes S ...    the precision ladder: int8, fp8, int4, each with its speed and accuracy, beside 16 bits, an INT8
#                      lm_head and an FP8 KV cache; and how much every step from the baseline to the engine is worth
set -euo pipefail
quick= name=local model_args=() device=auto lm_head=checkpoint headline= ladder= schemes=()
usage() { sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'; }
while [ $# -gt 0 ]; do
  case ${1//_/-} in # both spellings, as in the Python scripts
    --quick) quick=1 ;;
    --headline) headline=1 ;;
    --name | --device | --model-dir | --synthetic | --lm-head)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      case ${1//_/-} in
        --name) name=$2 ;;
        --device) device=$2 ;;
        --lm-head) lm_head=$2 ;;
        *) model_args=("$1" "$2") ;;
      esac
      shift
      ;;
    --schemes)
      while [[ ${2:-} =~ ^(int8|fp8|int4)$ ]]; do
        ladder=1
        [ "$2" = int8 ] || schemes+=("$2")
        shift
      done
      [ -n "$ladder" ] || { echo "error: --schemes takes int8, fp8, int4, not ${2:-nothing}" >&2; exit 2; }
      ;;
    -h | --help) usage; exit 0 ;;
    *) echo "error: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
[[ $name =~ ^[a-z0-9][a-z0-9_-]*$ ]] || { echo "error: --name takes lower-case letters, digits, - and _" >&2; exit 2; }
[[ $lm_head =~ ^(checkpoint|int8)$ ]] || { echo "error: --lm-head is checkpoint or int8, not $lm_head" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

results=results/$name
step() { printf '\n\033[1m[%s/8] %s\033[0m\n' "$1" "$2"; }
started=$SECONDS
device=$("$PY" -m llama_engine.device "$device")
if [ "$device" = cuda ]; then
  batch=64 concurrency="1 2 4 8 16 32 64" whole=$concurrency company=(--kernels auto streaming)
else
  batch=16 concurrency="1 2 4 8" whole=8 company=(--prompts 16) # all of them would take too long on two cores
fi
if [ -n "$quick" ]; then # five timed runs are the fewest that are VALID
  measure=(--output-tokens 64 --warmup 1 --runs 5 --batch-output-tokens 32 --batch-runs 1 --prefill-tokens 128)
  load=(--output-tokens 64) concurrency="1 ${concurrency##* }" whole=${concurrency##* }
  accuracy=(--quick --greedy-prompts 2 --greedy-tokens 32) company+=(--prompts 8 --output-tokens 24 --runs 2) profile=(--output-tokens 16)
else
  measure=() load=(--output-tokens 512) accuracy=() profile=()
fi
# what FP8 is worth shows in large batches
if [ -n "$ladder" ] && [ "$device" = cuda ]; then batch=256 measure+=(--batch 8 32 64 256); fi

step 1 "prepare the model"
model=$("$PY" scripts/prepare_model.py "${model_args[@]}" | tail -n 1)
checkpoint=checkpoints/$(basename "$model") engine=engines/$(basename "$model")
echo "$model"

step 2 "convert it to an INT8 weight-only checkpoint"
./scripts/convert_checkpoint.sh --model_dir "$model" --output_dir "$checkpoint" --force

step 3 "build the engine"
./scripts/build_engine.sh --checkpoint_dir "$checkpoint" --output_dir "$engine" --backend native \
  --max_batch_size "$batch" --lm_head "$lm_head" --force

step 4 "baseline and engine, interleaved"
"$PY" benchmarks/compare.py --model-dir "$model" --engine-dir "$engine" --device "$device" --output "$results" --force "${measure[@]}"

step 5 "accuracy of the engine, and whether its answers depend on their company"
"$PY" benchmarks/accuracy.py --model-dir "$model" --engine-dir "$engine" --device "$device" \
  --output "$results/accuracy-native.json" --force "${accuracy[@]}" || [ $? -eq 1 ] # a failed gate is a result too

"$PY" benchmarks/benchmark_determinism.py --model-dir "$model" --engine-dir "$engine" --device "$device" \
  --output "$results/determinism-native.json" --force "${company[@]}" || [ $? -eq 1 ]

step 6 "Triton Inference Server under load, streaming and not"
load+=(--engine-dir "$engine" --device "$device" --force)
if "$PY" -m llama_engine.serving.wheel > /dev/null; then # which says why not
  "$PY" benchmarks/benchmark_triton.py "${load[@]}" --concurrency $concurrency --output "$results/triton-native.json" ||
    [ $? -eq 1 ] # so is an INVALID run
  "$PY" benchmarks/benchmark_triton.py "${load[@]}" --concurrency $whole --no-streaming \
    --output "$results/triton-native-whole.json" || [ $? -eq 1 ]
fi

step 7 "profile"
./scripts/profile_nsight.sh --model-dir "$model" --engine-dir "$engine" --device "$device" \
  --output "$results/profile.json" --force "${profile[@]}"

if [ -n "$ladder" ]; then source scripts/ladder.sh; fi

step 8 "pictures and report"
if [ -n "$headline" ]; then
  "$PY" scripts/plot_results.py --headline "$name"
else
  "$PY" scripts/plot_results.py --results-dir "$results"
fi

printf '\n'
"$PY" scripts/show_results.py "$results"
printf 'done in %d:%02d\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
