#!/usr/bin/env bash
# Every arm against every share of poison: see the head of benchmarks/evidence.py, whose arguments
# these are. Makes the environment where there is none; two worlds, hours on two cores.
#
#   bash benchmarks/evidence.sh --world toy
#   bash benchmarks/evidence.sh --world real --jobs 1
#   bash benchmarks/evidence.sh --quick              minutes; what .ci/run does
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_env.sh
source launch/setup_env.sh

setup_environment
choose_accelerator
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python benchmarks/evidence.py "$@"
