#!/usr/bin/env bash
# The deepspeed launcher over several hosts, as one that ends when a host is gone: same arguments.
#
#   launch/deepspeed.sh --hostfile launch/hostfile launch/finetune.py CONFIG.yaml [key=value ...]
#
# The launcher waits for pdsh and pdsh for its ssh connections, which by themselves notice a host
# without power or network only after TCP's two hours. PDSH_SSH_ARGS_APPEND of your own is kept.
set -euo pipefail
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:--o ServerAliveInterval=5 -o ServerAliveCountMax=6}"
exec deepspeed "$@"
