#!/usr/bin/env bash
#SBATCH --job-name=safereg-megatron
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Tensor parallelism 8 (inside a node), pipeline 4, data parallelism 4 on 16 nodes of 8 GPUs. With
# Megatron-LM: put the two lines into a copy of its pretrain_gpt.py, and name that here.
set -euo pipefail
: "${SLURM_JOB_NODELIST:?is not set: submit this file with sbatch}"

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export CUDA_DEVICE_MAX_CONNECTIONS=1

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
    pretrain_gpt_safe.py \
    --tensor-model-parallel-size 8 --sequence-parallel \
    --pipeline-model-parallel-size 4 \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --calculate-per-token-loss --bf16 \
    "$@"
