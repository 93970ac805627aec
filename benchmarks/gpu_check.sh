#!/usr/bin/env bash
# Kernels, losses and training steps on one GPU, in under 9 minutes, in one shot, without a network.
#
#   bash benchmarks/gpu_check.sh [OUT] [--cpu] [--only STAGE[,STAGE]...]
#
# OUT (default benchmarks/results/kernels) gets cuda.csv, to which every row is added the moment it
# is measured, the figures drawn from it, and stacks.csv (one rank of every stack). Nothing is timed
# unless the gate, the kernels' own test at production shapes, passes. A stage that runs out of time
# leaves its rows. Exit status: 0 all stages passed, 1 one failed, 2 no GPU or a wrong argument.
#
#   --cpu     the same stages at small sizes on the CPU, into OUT/cpu.csv (default runs/gpu_check):
#             a test of this script; none of its figures is one of a GPU
#   --only    some stages, added to what OUT holds: versions gate parts linear masked_kl chunks step
#             zero3 stacks peers compiled figures
#
# Environment: PYTHON, the interpreter (default .venv/bin/python where there is one, else python3);
# SAFEREG_GATE, another command for the gate. Packages that are compared with (liger_kernel,
# cut_cross_entropy, quack) are used where they can be imported.
set -uo pipefail

stages=" versions gate parts linear masked_kl chunks step zero3 stacks peers compiled figures "
device=cuda out="" only=""

refuse() {
  printf 'gpu_check: %s\n' "$*" >&2
  exit 2
}

while (($#)); do
  case "$1" in
    --cpu) device=cpu ;;
    --only)
      shift
      only=" ${1:-} "
      only="${only//,/ }"
      ;;
    -*) refuse "unknown option $1: see the head of $0" ;;
    *) out="$1" ;;
  esac
  shift
done
for name in $only; do
  [[ "$stages" == *" $name "* ]] || refuse "no stage $name: choose from$stages"
done

if [[ "$device" == cuda ]]; then
  # Asked first, and not torch: a cold import can take a minute.
  gpu="$(timeout 30 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader \
    2>&1)" || refuse "no GPU: nvidia-smi says '${gpu%%$'\n'*}': use a machine with one, or --cpu"
  echo "$gpu"
fi

[[ -n "$out" && "$out" != /* ]] && out="$PWD/$out"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1
root="$PWD"
if [[ -z "$out" ]]; then
  out="$root/benchmarks/results/kernels"
  [[ "$device" == cpu ]] && out="$root/runs/gpu_check"
fi
mkdir -p "$out" || refuse "cannot write to $out"
csv="$out/$device.csv"

python="${PYTHON:-python3}"
[[ -z "${PYTHON:-}" && -x .venv/bin/python ]] && python=.venv/bin/python
export PYTHONPATH="$root/kernels:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Whoever runs this may have chosen a path; figures are those of the default one.
unset SAFEREG_KERNELS TRITON_INTERPRET
slower=1
[[ "$device" == cpu ]] && slower=4 # times the limits: a busy machine of two cores
total=$((530 * slower)) reserve=$((20 * slower)) status=0

# stage NAME SECONDS COMMAND...: runs it where it is asked for, no longer than SECONDS nor beyond what
# is left of the whole; remembers that it failed.
stage() {
  local name=$1 seconds=$(($2 * slower)) left=$((total - SECONDS)) code
  shift 2
  [[ -z "$only" || "$only" == *" $name "* ]] || return 0
  [[ "$name" == figures ]] || left=$((left - reserve)) # so that what is there can be drawn
  ((seconds > left)) && seconds=$((left > 0 ? left : 1))
  printf '\n== %s (at most %s s; %s s so far)\n' "$name" "$seconds" "$SECONDS"
  timeout --kill-after=5 "$seconds" "$@"
  code=$?
  ((code == 124 || code == 137)) && echo "gpu_check: $name is out of time; its rows stay"
  ((code == 0)) || status=1
  return $code
}

kernels() {
  local name=$1 seconds=$2
  stage "$name" "$seconds" "$python" benchmarks/bench_kernels.py "$name" \
    --device "$device" --out "$csv"
}

stage versions 90 "$python" benchmarks/versions.py "$device"
gate=("$python" kernels/tests/gate.py --device "$device")
[[ -n "${SAFEREG_GATE:-}" ]] && read -ra gate <<<"$SAFEREG_GATE"
if ! stage gate 90 "${gate[@]}"; then
  echo "gpu_check: the gate failed: nothing is timed" >&2
  exit 1
fi
[[ -z "$only" ]] && rm -f "$csv"
kernels parts 60
kernels linear 70
kernels masked_kl 35
kernels chunks 45
# One big allocation after another of another size: without this, 80 GB can be too few for the last.
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
  stage step 80 "$python" benchmarks/bench_step.py --device "$device" --out "$csv"
stage zero3 80 "$python" benchmarks/bench_zero3.py --device "$device" --out "$csv"
# Every stack of the plugin on this GPU against float64, several at once; on a CPU one of them.
stacks=(--out "$out/stacks.csv")
[[ "$device" == cpu ]] && stacks+=(--only train-lora-single)
stage stacks 130 "$python" benchmarks/bench_stacks.py --check "${stacks[@]}"
kernels peers 75
kernels compiled 100
stage figures 20 "$python" benchmarks/plot.py "$out"

if ((status == 0)); then
  echo "gpu_check: all stages passed in $SECONDS s"
else
  echo "gpu_check: a stage failed, see above ($SECONDS s)"
fi
exit $status
