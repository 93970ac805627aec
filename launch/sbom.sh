#!/usr/bin/env bash
# Writes the software bill of materials of the project's environment: what is installed in .venv, with
# versions, licences and what needs what, as CycloneDX JSON.
#
#   bash launch/sbom.sh [FILE]         default: sbom.json
#
# The tool comes into an environment of its own, so that it does not list itself.
set -euo pipefail

_here="${BASH_SOURCE[0]%/*}"
[[ "$_here" == "${BASH_SOURCE[0]}" ]] && _here=.
# shellcheck source=launch/setup_env.sh
source "$_here/setup_env.sh"

out="${1:-sbom.json}"
venv_works || fail "expected an environment in $VENV: bash launch/setup_env.sh"
folder="$(mktemp -d)"
trap 'rm -rf -- "$folder"' EXIT
"$VENV/bin/python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "cyclonedx-bom==7.5.0"
"$folder/venv/bin/cyclonedx-py" environment --output-reproducible --output-format JSON \
    --output-file "$out" "$VENV/bin/python"
say "$out: $("$VENV/bin/python" -c 'import json, sys
print(len(json.load(open(sys.argv[1]))["components"]))' "$out") components"
