#!/usr/bin/env bash
# Kernels on one GPU in under 9 minutes, without a network: versions, correctness, times, figures.
#   bash benchmarks/gpu_check.sh [FOLDER]
# Results go to FOLDER (default benchmarks/results/kernels). Liger-Kernel is compared with where it
# can be imported. Without a CUDA device the kernels are interpreted on the CPU at tiny sizes, the
# CPU path is timed at small ones, and results go to runs/gpu_check: there are no GPU figures then.
set -uo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
status=0

# stage SECONDS COMMAND...: runs it, and remembers that it failed or ran out of time.
stage() {
  local seconds=$1
  shift
  printf '\n== %s\n' "$*"
  timeout --kill-after=5 "$seconds" "$@"
  local code=$?
  ((code == 124)) && echo "gpu_check: out of time after $seconds s; what was written stays"
  ((code == 0)) || status=1
  return $code
}

# The limits below add up to 525 seconds.
stage 60 "$python" - <<'EOF'
import importlib

for name in ("torch", "triton", "transformers", "liger_kernel"):
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "(installed)"))
    except ImportError:
        print(name, "not installed")
EOF

if timeout 30 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  folder="${1:-benchmarks/results/kernels}"
  stage 5 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  if compgen -G 'tests/gpu/test_*.py' >/dev/null; then
    stage 90 "$python" -m pytest tests/gpu -q -p no:cacheprovider
  else
    echo "no tests in tests/gpu"
  fi
  stage 310 "$python" benchmarks/bench_kernels.py --device cuda --out "$folder/cuda.csv"
else
  folder="${1:-runs/gpu_check}"
  echo "no CUDA device: kernels are interpreted on the CPU, and nothing here is a GPU figure"
  stage 120 env SAFEREG_KERNELS=triton TRITON_INTERPRET=1 \
    "$python" benchmarks/bench_kernels.py --device cpu --check-only
  stage 280 env SAFEREG_KERNELS=eager \
    "$python" benchmarks/bench_kernels.py --device cpu --quick --out "$folder/cpu.csv"
fi

stage 30 "$python" benchmarks/plot.py "$folder"
((status == 0)) && echo "gpu_check: all stages passed" || echo "gpu_check: a stage failed, see above"
exit $status
