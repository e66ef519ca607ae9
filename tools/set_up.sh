#!/usr/bin/env bash
# Make the virtual environment and install the pinned versions: set_up.sh VENV STAMP
#
# STAMP is written last, so that a set-up which failed or was interrupted is done again.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 stamp=$2

rm -f "$stamp"
if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "== Set-up: checking the packages in $venv"
else
    python=$(tools/find_python.sh)
    echo "== Set-up, once: $("$python" --version) ($python) -> $venv"
    echo "   About 5 GB and some minutes, nearly all of it torch with its CUDA libraries."
    "$python" -m venv --clear "$venv"
fi
install=("$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt)
"${install[@]}" setuptools
extras=test
# Megatron imports FlashAttention-4 wherever it is installed, which takes 2 s of every start.
if compgen -G '/dev/nvidia[0-9]*' >/dev/null; then extras+=,attention; fi
"${install[@]}" --no-build-isolation -e ".[$extras]"
touch "$stamp"
echo "== Set-up done"
