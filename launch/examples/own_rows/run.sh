#!/usr/bin/env bash
# Your rows, your model, a probe, DeepSpeed ZeRO-3: from nothing to a report.
#
#   bash run.sh MODEL ROWS.jsonl LABELLED.jsonl PROMPTS.jsonl OUT [key=value ...]
#
# LABELLED: `prompt` and `label` (harmful or benign), what the probe learns from and the anchors answer,
# at least 95 harmful ones. PROMPTS: harmful and harmless requests held out for the evaluation.
# GPUS: processes (default 2).
set -euo pipefail
model=$1 rows=$2 labelled=$3 prompts=$4 out=$5
shift 5
mkdir -p "$out"

safereg probe fit --model "$model" --data "$labelled" --out "$out/probe"
safereg anchor build --model "$model" --prompts "$labelled" --out "$out/anchor.jsonl"
cat >"$out/run.yaml" <<YAML
model: $(realpath "$model")
data: {train: $(realpath "$rows"), anchor: $(realpath "$out/anchor.jsonl")}
risk: {estimator: probe, path: $(realpath "$out/probe")}
output_dir: $(realpath "$out")/run
YAML
safereg audit "$out/run.yaml" "$@"
safereg launch "$out/run.yaml" --nproc "${GPUS:-2}" "$@"
safereg eval --model "$model" --prompts "$prompts" --out "$out/base/eval.json"
safereg eval --model "$out/run/model" --prompts "$prompts" --out "$out/run/eval.json" \
    --base "$out/base/eval.json"
safereg report "$out/run"
safereg ledger verify "$out/run"
