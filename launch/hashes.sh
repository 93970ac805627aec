#!/usr/bin/env bash
# Writes launch/hashes.txt: every pin of constraints.txt but torch and triton with the hashes of all
# its files in the package index, so of the wheels of every Python and platform. Run it after a pin
# has changed; what it writes is checked by pip at each installation (--require-hashes).
#
#   bash launch/hashes.sh
set -euo pipefail
cd -- "$(dirname "${BASH_SOURCE[0]}")"

folder="$(mktemp -d)"
trap 'rm -rf -- "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q uv
grep -v -e '^#' -e '^torch==' -e '^triton==' constraints.txt >"$folder/pins.txt"
{
    echo "# Written by launch/hashes.sh from constraints.txt: do not edit."
    "$folder/venv/bin/uv" pip compile -q --no-config --no-deps --universal --python-version 3.11 \
        --generate-hashes --no-header --no-annotate "$folder/pins.txt"
} >"$folder/hashes.txt"
mv -f -- "$folder/hashes.txt" hashes.txt
