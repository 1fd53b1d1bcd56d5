# shellcheck shell=bash disable=SC2154
# Sourced by run_all.sh, whose variables it reads, for --schemes: the same model in each scheme, and each step from the baseline to
# the engine measured by leaving it out.
step 7 "the precision ladder and the ablation"
real=$("$PY" scripts/prepare_model.py | tail -n 1) # accuracy means nothing on synthetic weights
[[ ${model_args[0]:-} = --synthetic ]] || real=$model
common=(--device "$device" --force)
optimized() { "$PY" benchmarks/benchmark_optimized.py --model-dir "$model" --engine-dir "$1" "${common[@]}" "${measure[@]}" "${@:2}"; }
build() { # scheme, model, where to: convert and build
  local flags=() head=$lm_head tiles=()
  case $1 in
    fp16) flags=(--no-use_weight_only) ;;
    fp8) flags=(--use_fp8_rowwise --fp8_recipe all) ;;
    int4) flags=(--weight_only_precision int4 --group_size auto) ;;
    int8-head) head=int8 ;;
    fp8-kv) flags=(--kv_cache_dtype fp8) ;;
  esac
  [[ $1 != @(fp16|fp8|int4) ]] || head=checkpoint
  if [[ $1 = @(int8-head|fp8-kv) ]]; then # whose layers are the INT8 engine's, tuned already
    if [ "$2" = "$model" ]; then tiles=(--tiles "$engine"); else tiles=(--tiles "engines/$(basename "$2")-int8"); fi
  fi
  ./scripts/convert_checkpoint.sh --model_dir "$2" --output_dir "checkpoints/$3" --force "${flags[@]}"
  ./scripts/build_engine.sh --checkpoint_dir "checkpoints/$3" --output_dir "engines/$3" --backend native \
    --max_batch_size "$batch" --lm_head "$head" --force "${tiles[@]}"
}
[ "$lm_head" = int8 ] || schemes=(int8-head "${schemes[@]}")
for scheme in fp16 int8 fp8-kv "${schemes[@]}"; do
  own=engines/$(basename "$model")-$scheme judged=engines/$(basename "$real")-$scheme score=("${accuracy[@]}")
  if [ "$scheme" = int8 ]; then
    [ "$real" != "$model" ] || continue # the folder's own gate says it
  elif [[ $device = cpu && $scheme = fp8* ]]; then # emulated by PyTorch operations, slowly: accuracy alone, a quick gate
    score=(--quick --greedy-prompts 2 --greedy-tokens 32)
    [ "$real" != "$model" ] || build "$scheme" "$model" "$(basename "$own")"
  else
    build "$scheme" "$model" "$(basename "$own")"
    optimized "$own" --output "$results/ladder-$scheme.json"
  fi
  [ "$real" = "$model" ] || build "$scheme" "$real" "$(basename "$judged")"
  "$PY" benchmarks/accuracy.py --model-dir "$real" --engine-dir "$judged" "${common[@]}" \
    --output "$results/ladder-$scheme-accuracy.json" "${score[@]}" || [ $? -eq 1 ]
done
[ "$device" = cpu ] || optimized "$engine" --kernels streaming --output "$results/ablation-int8.json"
compiled=()
[ "$device" = cuda ] || compiled=(--warmup 1 --runs 5 --prefill-tokens 0) # the fewest that are VALID: this is slow
[ -z "$quick" ] || compiled=(--output-tokens 64 --warmup 1 --runs 5 --prefill-tokens 128)
"$PY" benchmarks/baseline.py --compile --model-dir "$model" "${common[@]}" --output "$results/ablation-compiled.json" "${compiled[@]}" ||
  echo "note: transformers did not compile here; the ablation goes on without that step" >&2
