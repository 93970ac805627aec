#!/usr/bin/env bash
# All tests, on a fresh machine too: makes the environment, then runs pytest in the project root.
#
#   bash launch/test.sh                            everything that this machine can run
#   bash launch/test.sh tests/unit -k ledger -x    arguments go to pytest
#   SAFEREG_TESTS=full bash launch/test.sh         all cases of the long proofs too
set -euo pipefail

_here="${BASH_SOURCE[0]%/*}"
[[ "$_here" == "${BASH_SOURCE[0]}" ]] && _here=.
# shellcheck source=launch/setup_env.sh
source "$_here/setup_env.sh"

setup_environment
choose_accelerator
export PYTHONUNBUFFERED=1
(($# > 0)) && exec python -m pytest "$@"
# A process a core; those of several ranks come first, since they wait for one another a lot.
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS=1
exec python -m pytest -n "$cores" --dist worksteal \
    tests/multinode tests/distributed kernels/tests tests/fuzz tests/unit
