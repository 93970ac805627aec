#!/usr/bin/env bash
# LLaMA-Factory's ASFT loss (`use_asft_loss`: fine-tuning with a full-vocabulary KL to a reference)
# and ours: the same KL on the same logits, and what a step costs on the same rows. Writes
# benchmarks/results/asft.csv; fails where the divergences differ by more than rounding.
#
#   bash benchmarks/asft.sh FOLDER
#
# On one core, minutes. FOLDER/env-llamafactory is made where it is not there (2 GB), the same as
# stacks_yaml.sh's. LLaMA-Factory's own functions are called; none of its code is here.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: bash benchmarks/asft.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# shellcheck source=benchmarks/stack_environments.sh
source "$root/benchmarks/stack_environments.sh"

environment llamafactory
PYTHONPATH="$root/kernels:$root" "$folder/env-llamafactory/bin/python" \
    "$root/benchmarks/asft_worker.py" "$folder/asft" "$root/benchmarks/results/asft.csv"
