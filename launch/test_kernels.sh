#!/usr/bin/env bash
# The kernel package alone: its wheel, in an environment that holds nothing else, passes its tests.
#
#   bash launch/test_kernels.sh             all of kernels/tests that need torch and triton only
#   bash launch/test_kernels.sh -k shift    arguments go to pytest
#
# Needs Python 3.11 or 3.12; works in a temporary folder and removes it. SAFEREG_TORCH_INDEX and
# pip's own settings count as in setup_env.sh. pip's cache makes a second run quick.
set -euo pipefail

_here="${BASH_SOURCE[0]%/*}"
[[ "$_here" == "${BASH_SOURCE[0]}" ]] && _here=.
# shellcheck source=launch/setup_env.sh
source "$_here/setup_env.sh"

find_python
check_venv_module "$BASE_PYTHON"
folder="$(mktemp -d)"
trap 'rm -rf -- "$folder"' EXIT
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV

# A copy, without what builds in place have left: setuptools would pack that too.
mkdir "$folder/kernels"
(cd "$PROJECT_ROOT/kernels" && tar -cf - --exclude=build --exclude='*.egg-info' \
    --exclude=__pycache__ .) | tar -xf - -C "$folder/kernels"

VENV="$folder/venv"
say "an environment with torch, triton, pytest, numpy and hypothesis"
"$BASE_PYTHON" -m venv "$VENV" </dev/null
install_torch ""
quietly "installing pytest failed: $GO_ON" \
    pip_install -c "$CONSTRAINTS" setuptools pytest numpy hypothesis
if ! "$VENV/bin/python" -c 'import triton' 2>/dev/null </dev/null; then
    quietly "installing $TRITON_FOR_CPU failed: $GO_ON" \
        pip_install "$TRITON_FOR_CPU; platform_system == 'Linux'"
fi
say "kernels/, built and installed"
quietly "building kernels/ failed" pip_install --no-build-isolation "$folder/kernels"
quietly "the packages do not go together" "$VENV/bin/python" -m pip check
cd -- "$folder"
"$VENV/bin/python" - <<'EOF'
from importlib.util import find_spec

found = find_spec("safereg_kernels").origin
assert "site-packages" in found, f"the wheel is to be tested, found {found}"
assert find_spec("safereg_dist") is None, "an environment with safereg_dist proves nothing"
EOF
say "its tests"
"$VENV/bin/python" -m pytest -p no:cacheprovider "$folder/kernels/tests" "$@"
