#!/usr/bin/env bash
# axolotl and LLaMA-Factory, each in an environment of its own below FOLDER: 20 steps of a tiny model
# against float64, on one rank, packed, and on two ranks (gloo, DDP); and all risks 0 against the
# stack alone. Writes rows of benchmarks/results/stacks_yaml.csv, in the place of those of the same
# stack, ranks, accumulation and precision.
#
#   bash benchmarks/stacks_yaml.sh FOLDER [axolotl|llamafactory]
#
# On CPUs. An environment that is there is used as it is.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: bash benchmarks/stacks_yaml.sh FOLDER [axolotl|llamafactory]}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
stacks=${2:-axolotl llamafactory}
worker=$root/benchmarks/stacks_yaml_worker.py
results=$root/benchmarks/results/stacks_yaml.csv
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export AXOLOTL_DO_NOT_TRACK=1 ACCELERATE_USE_CPU=true
# shellcheck source=benchmarks/stack_environments.sh
source "$root/benchmarks/stack_environments.sh"

for stack in $stacks; do
    environment "$stack"
    bin=$folder/env-$stack/bin work=$folder/$stack
    mkdir -p "$work"
    "$bin/python" "$worker" write "$work" > "$work/write.log" 2>&1
    for run in 1 packed-1 2 plain zero; do
        start=("$bin/python")
        [ "$run" = 2 ] && start=("$bin/torchrun" --standalone --nproc-per-node 2)
        "${start[@]}" "$worker" train "$stack-$run" "$work" > "$work/$run.log" 2>&1 ||
            { tail -n 30 "$work/$run.log"; exit 1; }
        case $run in
            plain) ;;
            zero) "$bin/python" "$worker" compare "$stack" "$work" 2> "$work/judge.log" ;;
            *) "$bin/python" "$worker" judge "$stack-$run" "$work" "$results" 2> "$work/judge.log" ;;
        esac
    done
done
