#!/usr/bin/env bash
# Two GPUs of one machine behind one HTTP gateway: throughput of one and of both at 64 and 128 users a GPU, and what
# users see when one of two servers is killed. The model is Llama 3.1 8B's geometry with random weights.
#
#   ./scripts/measure_scaling.sh                         results/local/failover.json
#   ./scripts/measure_scaling.sh --engine-dir ENGINE     an engine that is there already, for 128 sequences at once
#   ./scripts/measure_scaling.sh --name h100-x2          into results/h100-x2
#   ./scripts/measure_scaling.sh --gateways 4            four gateway processes, where one is too few
#   ./scripts/measure_scaling.sh --instances 2           one server with both GPUs: Triton's instance group
set -euo pipefail
engine="" name=local gateways=1 instances=1
while [ $# -gt 0 ]; do
  case ${1//_/-} in
    --engine-dir | --name | --gateways | --instances) [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;&
    --engine-dir) engine=$2; shift ;;
    --name) name=$2; shift ;;
    --gateways) gateways=$2; shift ;;
    --instances) instances=$2; shift ;;
    -h | --help) sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "$engine" ]; then
  model=$("$PY" scripts/prepare_model.py --synthetic llama-3.1-8b --words | tail -n 1)
  checkpoint=checkpoints/$(basename "$model") engine=engines/$(basename "$model")-128
  ./scripts/convert_checkpoint.sh --model_dir "$model" --output_dir "$checkpoint" --force
  ./scripts/build_engine.sh --checkpoint_dir "$checkpoint" --output_dir "$engine" --backend native --max_batch_size 128 --force
fi
output=failover.json
[ "$instances" = 1 ] || output=failover-instances.json
"$PY" benchmarks/benchmark_failover.py --engine-dir "$engine" --device cuda --replicas 2 --concurrency 64 128 \
  --input-tokens 128 --output-tokens 256 --duration 20 --stream-interval 4 --kernels streaming \
  --gateways "$gateways" --instances "$instances" --output "results/$name/$output" --force
