#!/usr/bin/env bash
# No labels: the probe learns from what the model itself refuses. One process.
#
#   bash run.sh MODEL ROWS.jsonl PROMPTS.jsonl OUT [key=value ...]
#
# PROMPTS: requests of both kinds (`prompt`), unlabelled; the model has to refuse some of them.
set -euo pipefail
model=$1 rows=$2 prompts=$3 out=$4
shift 4
mkdir -p "$out"

safereg probe fit --self-supervised --model "$model" --data "$prompts" --out "$out/probe"
cat >"$out/run.yaml" <<YAML
model: $(realpath "$model")
data: {train: $(realpath "$rows")}
risk: {estimator: probe, path: $(realpath "$out/probe")}
output_dir: $(realpath "$out")/run
engine: {name: single}
YAML
safereg audit "$out/run.yaml" "$@"
safereg train "$out/run.yaml" "$@"
