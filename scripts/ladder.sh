# shellcheck shell=bash disable=SC2154
# Sourced by run_all.sh, whose variables it reads, for --schemes: the same model in each scheme, and each step from the baseline to
# the engine measured by leaving it out.
step 7 "the precision ladder and the ablation"
real=$("$PY" scripts/prepare_model.py | tail -n 1) # accuracy means nothing on synthetic weights
[[ ${model_args[0]:-} = --synthetic ]] || real=$model
common=(--device "$device" --force)
optimized() { "$PY" benchmarks/benchmark_optimized.py --model-dir "$model" --engine-dir "$1" "${common[@]}" "${measure[@]}" "${@:2}"; }
build() { # scheme, model, where to: convert and build
  case $1 in
    fp16) local flags=(--no-use_weight_only) head=checkpoint ;;
    fp8) local flags=(--use_fp8_rowwise --fp8_recipe all) head=checkpoint ;;
    int4) local flags=(--weight_only_precision int4 --group_size auto) head=checkpoint ;;
    int8-head) local flags=() head=int8 ;;
    *) local flags=() head=$lm_head ;;
  esac
  ./scripts/convert_checkpoint.sh --model_dir "$2" --output_dir "checkpoints/$3" --force "${flags[@]}"
  ./scripts/build_engine.sh --checkpoint_dir "checkpoints/$3" --output_dir "engines/$3" --backend native \
    --max_batch_size "$batch" --lm_head "$head" --force
}
for scheme in fp16 int8 "${schemes[@]}"; do
  if [ "$scheme" != int8 ]; then
    build "$scheme" "$model" "$(basename "$model")-$scheme"
    optimized "engines/$(basename "$model")-$scheme" --output "$results/ladder-$scheme.json"
  fi
  [ "$scheme" != int8 ] || [ "$real" != "$model" ] || continue # the folder's own gate says it
  [ "$real" = "$model" ] || build "$scheme" "$real" "$(basename "$real")-$scheme"
  "$PY" benchmarks/accuracy.py --model-dir "$real" --engine-dir "engines/$(basename "$real")-$scheme" "${common[@]}" \
    --output "$results/ladder-$scheme-accuracy.json" "${accuracy[@]}" || [ $? -eq 1 ]
done
[ "$device" = cpu ] || optimized "$engine" --kernels streaming --output "$results/ablation-int8.json"
"$PY" benchmarks/baseline.py --compile --model-dir "$model" "${common[@]}" --output "$results/ablation-compiled.json" \
  $([ -z "$quick" ] || echo "--output-tokens 64 --warmup 1 --runs 5 --prefill-tokens 128") ||
  echo "note: transformers did not compile here; the ablation goes on without that step" >&2
