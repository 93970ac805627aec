#!/usr/bin/env bash
# All tests, on a fresh machine too: makes the environment, then runs pytest in the project root.
#
#   bash launch/test.sh                            everything that this machine can run
#   bash launch/test.sh tests/unit -k ledger -x    arguments go to pytest
set -euo pipefail

_here="${BASH_SOURCE[0]%/*}"
[[ "$_here" == "${BASH_SOURCE[0]}" ]] && _here=.
# shellcheck source=launch/setup_env.sh
source "$_here/setup_env.sh"

setup_environment
choose_accelerator
export PYTHONUNBUFFERED=1
exec python -m pytest "$@"
