#!/usr/bin/env bash
# A judge gives every row its risk ahead of time; training then needs no judge and no probe.
#
#   vllm serve meta-llama/Llama-Guard-3-8B --port 8000 &      any OpenAI-compatible server
#   ENDPOINT=http://127.0.0.1:8000/v1 JUDGE=meta-llama/Llama-Guard-3-8B \
#       bash run.sh MODEL ROWS.jsonl OUT [key=value ...]
#
# FORMAT: how the judge is asked (default llama_guard; `safereg score --help` names the others). A key
# is read from SAFEREG_API_KEY. Killed, the same command asks only for the rows that are left. GPUS:
# processes (default 2).
set -euo pipefail
model=$1 rows=$2 out=$3
shift 3
mkdir -p "$out"

safereg score --endpoint "$ENDPOINT" --model "$JUDGE" --format "${FORMAT:-llama_guard}" \
    --data "$rows" --out "$out/scored.jsonl"
cat >"$out/run.yaml" <<YAML
model: $(realpath "$model")
data: {train: $(realpath "$out/scored.jsonl")}
risk: {estimator: column}
output_dir: $(realpath "$out")/run
YAML
safereg audit "$out/run.yaml" "$@"
safereg launch "$out/run.yaml" --nproc "${GPUS:-2}" "$@"
