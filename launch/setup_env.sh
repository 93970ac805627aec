#!/usr/bin/env bash
# Makes the project's Python environment, .venv in its root, or reuses it when it is up to date.
#
#   bash launch/setup_env.sh         make it and say what to do next
#   source launch/setup_env.sh       only define the functions, as demo.sh and test*.sh do
#
# Needs Python 3.11 or 3.12 with its venv module and headers, a C++ compiler and some disk; what is
# missing is said in one line with the remedy, status 2, before anything is made. Knobs:
#
#   PYTHON                 the interpreter to build from (default: python3, python3.12, python3.11)
#   SAFEREG_TORCH_INDEX    package index for torch alone, e.g. https://download.pytorch.org/whl/cpu,
#                          whose wheel is small; without a GPU there is no need for the other one
#   SAFEREG_MIN_DISK_GB    free space to insist on (default 6)
#   PIP_*, pip.conf        your own index, mirrors, proxies and certificates, as always
set -euo pipefail

_script_dir="${BASH_SOURCE[0]%/*}"
[[ "$_script_dir" == "${BASH_SOURCE[0]}" ]] && _script_dir=.
PROJECT_ROOT="$(CDPATH='' cd -- "$_script_dir/.." && pwd -P)"
VENV="$PROJECT_ROOT/.venv"
CONSTRAINTS="$PROJECT_ROOT/launch/constraints.txt"
HASHES="$PROJECT_ROOT/launch/hashes.txt"
STAMP="$VENV/.safereg-stamp"
# A CUDA build of torch pins the Triton it was made with, so constraints.txt cannot; a CPU build
# brings none and gets this one (for the interpreter that tests kernels without a GPU).
TRITON_FOR_CPU="triton==3.9.0"
TORCH_FOR_CPU="https://download.pytorch.org/whl/cpu"
GO_ON="check the package index and the network, then run this again; it goes on where it stopped"

say() { printf '[setup] %s\n' "$*"; }

quietly() { # a command whose output goes to .venv/setup.log; $1 says what failed and the remedy
    local reason="$1" log="$VENV/setup.log"
    if ! "${@:2}" </dev/null >>"$log" 2>&1; then
        {
            printf '[setup] the end of %s:\n' "$log"
            tail -n 15 -- "$log" | sed 's/^/    /'
        } >&2
        fail "$reason"
    fi
}

fail() {
    printf '[setup] error: %s\n' "$*" >&2
    exit 2
}

# ---- checks: each returns, or ends the script with one line ------------------------------------

python_version() { # "3.11", or a failure where $1 does not run (a pyenv shim without a version)
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null
}

base_python() { # the interpreter behind $1, which may be a shim or that of an active environment
    "$1" -c 'import sys; print(sys._base_executable)' </dev/null
}

is_supported() { [[ "$1" == 3.11 || "$1" == 3.12 ]]; }

find_python() { # sets BASE_PYTHON
    local candidate version seen=""
    if [[ -n "${PYTHON:-}" ]]; then
        version="$(python_version "$PYTHON")" ||
            fail "PYTHON=$PYTHON does not run: point it at a Python 3.11 or 3.12, or unset it"
        is_supported "$version" ||
            fail "expected Python 3.11 or 3.12, PYTHON=$PYTHON is $version: point it at one of them"
        BASE_PYTHON="$(base_python "$PYTHON")"
        return
    fi
    for candidate in python3 python3.12 python3.11; do
        version="$(python_version "$candidate")" || continue
        if is_supported "$version"; then
            BASE_PYTHON="$(base_python "$candidate")"
            return
        fi
        seen="$seen, $candidate is $version"
    done
    fail "expected Python 3.11 or 3.12, found none${seen}: apt-get install python3 python3-venv" \
        "python3-dev, or set PYTHON to an interpreter"
}

check_venv_module() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null </dev/null ||
        fail "$1 has no venv module: apt-get install python3-venv" \
            "(or python$(python_version "$1")-venv)"
}

check_headers() {
    "$1" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' </dev/null ||
        fail "$1 has no headers (Python.h): apt-get install python3-dev" \
            "(or python$(python_version "$1")-dev)"
}

check_compiler() { # exports CXX where the compiler is not called c++
    local candidate
    for candidate in ${CXX:+"$CXX"} c++ g++ clang++; do
        if "$candidate" --version >/dev/null 2>&1 </dev/null; then
            [[ "$candidate" == c++ ]] || export CXX="$candidate"
            return
        fi
    done
    fail "no C++ compiler (tried ${CXX:+$CXX, }c++, g++, clang++), DeepSpeed compiles with one:" \
        "apt-get install g++"
}

check_disk() {
    local wanted_gb="${SAFEREG_MIN_DISK_GB:-6}" free_kb
    free_kb="$(df -Pk "$PROJECT_ROOT" | awk 'NR == 2 { print $4 }')"
    ((free_kb >= wanted_gb * 1024 * 1024)) ||
        fail "expected $wanted_gb GB free in $PROJECT_ROOT, found $((free_kb / 1024 / 1024)) GB:" \
            "free some, or move the project (SAFEREG_MIN_DISK_GB changes the limit)"
}

check_place() { # torch hands this path to the linker unquoted
    [[ "$PROJECT_ROOT" != *[[:space:]]* ]] ||
        fail "expected a project folder without spaces in its path (torch cannot compile there)," \
            "found '$PROJECT_ROOT': move the project"
    [[ -w "$PROJECT_ROOT" ]] ||
        fail "expected to be able to write in $PROJECT_ROOT: change its owner or copy it"
}

has_cuda() { # true where torch sees a GPU; does not load torch where there is no device at all
    compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/dxg || -e /dev/kfd ]] || return 1
    "$VENV/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
        2>/dev/null </dev/null
}

# ---- the environment ---------------------------------------------------------------------------

stamp_value() { # changes with the pins, the project's metadata, the interpreter and the place
    {
        cat "$CONSTRAINTS" "$HASHES" "$PROJECT_ROOT/setup.py" "$PROJECT_ROOT/pyproject.toml" \
            "$PROJECT_ROOT/kernels/pyproject.toml"
        "$VENV/bin/python" -c 'import sys; print(sys.version)' </dev/null
        printf '%s\n' "$PROJECT_ROOT"
    } | sha256sum | cut -d ' ' -f 1
}

venv_works() { # it runs, lies where it was made, and is of the version asked for
    local version
    version="$(python_version "$VENV/bin/python")" && is_supported "$version" || return 1
    [[ -z "${PYTHON:-}" || "$version" == "$(python_version "$PYTHON")" ]] || return 1
    grep -Fqs "$VENV/bin/python" "$VENV/bin/pip" || return 1
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 </dev/null
}

is_ready() { venv_works && [[ -f "$STAMP" && "$(<"$STAMP")" == "$(stamp_value)" ]]; }

pip_install() { # no prompts, no --user from a pip.conf
    PIP_NO_INPUT=1 PIP_USER=0 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$VENV/bin/python" -m pip install "$@" </dev/null
}

make_venv() {
    if [[ -e "$VENV" ]] && ! venv_works; then
        say "removing a .venv that is half-built, moved, or of another Python"
        rm -rf -- "$VENV"
    fi
    if [[ ! -e "$VENV" ]]; then
        say "1/4 .venv, with $BASE_PYTHON ($(python_version "$BASE_PYTHON"))"
        "$BASE_PYTHON" -m venv "$VENV" </dev/null ||
            fail "creating .venv failed (see above): check that $PROJECT_ROOT is writable"
    else
        say "1/4 .venv, completing the one that is there"
    fi
}

install_torch() { # $1 begins the line that says so
    local wanted found
    wanted="$(sed -n 's/^torch==//p' "$CONSTRAINTS")"
    found="$("$VENV/bin/python" -c 'import torch; print(torch.__version__.split("+")[0])' \
        2>/dev/null </dev/null || true)"
    if [[ "$found" == "$wanted" ]]; then
        say "${1}torch $wanted, which is there already"
        return
    fi
    if [[ -z "${SAFEREG_TORCH_INDEX:-}" ]] && ! compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
        say "${1}torch $wanted, several GB with CUDA; no GPU found, for which" \
            "SAFEREG_TORCH_INDEX=$TORCH_FOR_CPU has a wheel of 200 MB"
    else
        say "${1}torch $wanted (200 MB for CPU, several GB with CUDA)"
    fi
    quietly "installing torch $wanted failed: check the package index and the network, or set\
 SAFEREG_TORCH_INDEX=$TORCH_FOR_CPU" \
        pip_install ${SAFEREG_TORCH_INDEX:+--index-url "$SAFEREG_TORCH_INDEX"} "torch==$wanted"
}

# pip compares each file with its hash and resolves nothing: what is not in hashes.txt stays out.
# Without build isolation, in which pip would fetch build tools that have no hash (and DeepSpeed's
# build a torch of its own).
install_hashed() { # $1: `only` or `but`, then names of packages in hashes.txt
    local how="$1" names="${*:2}"
    awk -v how="$how" -v names="$names" '
        BEGIN { split(tolower(names), list, " "); for (i in list) wanted[list[i]] }
        /^[A-Za-z]/ { split($1, pin, "=="); taken = (tolower(pin[1]) in wanted) == (how == "only") }
        taken' "$HASHES" >"$VENV/requirements.txt"
    DS_BUILD_OPS=0 pip_install --no-build-isolation --no-deps --require-hashes \
        -r "$VENV/requirements.txt"
}

install_project() {
    say "4/4 DeepSpeed and the project"
    "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("triton")' \
        2>/dev/null </dev/null ||
        quietly "installing $TRITON_FOR_CPU failed: $GO_ON" \
            pip_install --no-deps "$TRITON_FOR_CPU; platform_system == 'Linux'"
    quietly "installing DeepSpeed failed: $GO_ON" install_hashed only deepspeed
    quietly "installing the project failed: $GO_ON" pip_install --no-build-isolation --no-deps \
        -e "$PROJECT_ROOT/kernels" -e "$PROJECT_ROOT"
    quietly "the pins of launch/hashes.txt do not go together: correct launch/constraints.txt and run\
 launch/hashes.sh" "$VENV/bin/python" -m pip check
}

build_environment() {
    local begin=$SECONDS
    find_python
    check_venv_module "$BASE_PYTHON"
    check_headers "$BASE_PYTHON"
    check_disk
    make_venv
    : >"$VENV/setup.log"
    activate
    say "2/4 the pinned dependencies, each checked against its hash (output: .venv/setup.log)"
    quietly "installing the tools of packaging failed: $GO_ON" \
        install_hashed only pip setuptools wheel ninja packaging
    quietly "installing the dependencies failed: $GO_ON" install_hashed but deepspeed
    install_torch "3/4 "
    install_project
    stamp_value >"$STAMP.tmp"
    mv -f -- "$STAMP.tmp" "$STAMP"
    say "environment ready in $((SECONDS - begin)) s"
}

activate() { # PATH: torch looks for ninja there; an inherited PYTHONPATH would shadow the pins
    unset PYTHONHOME PYTHONPATH
    export VIRTUAL_ENV="$VENV"
    [[ "$PATH" == "$VENV/bin:"* ]] || export PATH="$VENV/bin:$PATH"
    # Beside the torch they were compiled for: the default cache is shared by all torch versions.
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}"
}

choose_accelerator() { # without a GPU DeepSpeed must be told
    if [[ -z "${DS_ACCELERATOR:-}" ]] && ! has_cuda; then
        export DS_ACCELERATOR=cpu
    fi
    # Threads that wait give their core away instead of spinning: on a busy machine spinning has
    # been seen to slow training ten times (83 s against 9 s), on an idle one it gains little.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
}

setup_environment() { # the one entry: afterwards `python` is the environment's, in the project root
    cd -- "$PROJECT_ROOT"
    check_place
    check_compiler
    local lock
    exec {lock}>"$PROJECT_ROOT/.venv.lock"
    if command -v flock >/dev/null && ! flock -n "$lock"; then
        say "another set-up is at work in this folder, waiting for it"
        flock "$lock"
    fi
    if is_ready; then
        say "using .venv, which is up to date"
    else
        build_environment
    fi
    exec {lock}>&-
    activate
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    setup_environment
    say "next: bash launch/test.sh, bash launch/demo.sh, or . .venv/bin/activate"
fi
