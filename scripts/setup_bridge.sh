#!/usr/bin/env bash
# Add Megatron-Bridge to .venv, beside Transformer Engine (scripts/setup_te.sh, run that first). No GPU is needed.
# Nothing that is there changes its version: every package of constraints-bridge.txt is installed without dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
PINS=constraints-bridge.txt
PYTHON=$VENV/bin/python

say() { printf '[setup-bridge] %s\n' "$*"; }
fail() { printf '[setup-bridge] error: %s\n' "$*" >&2; exit 2; }

[ -x "$PYTHON" ] || fail "$PYTHON does not exist. Fix: run 'make setup' first."
"$PYTHON" -c "import torch, transformer_engine.pytorch" >/dev/null 2>&1 ||
    fail "Transformer Engine does not import. Fix: run scripts/setup_te.sh first."

# The pins that are not met: absent packages, and those whose version another file pins otherwise.
unmet() {
    "$PYTHON" - "$PINS" "$1" <<'PY'
import importlib.metadata, sys

for line in open(sys.argv[1]):
    name, _, wanted = line.strip().partition("==")
    if not wanted or name.startswith("#"):
        continue
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != wanted and (found is None) == (sys.argv[2] == "absent"):
        print(f"{name}=={wanted}")
PY
}

absent=$(unmet absent)
other=$(unmet other)
[ -z "$other" ] || say "left as they are, in another version than $PINS has: $(echo $other)"
if [ -n "$absent" ]; then
    say "installing $(echo $absent)"
    # shellcheck disable=SC2086  # one word a package
    "$PYTHON" -m pip install --quiet --no-deps $absent
fi
"$PYTHON" -W ignore -c "
import torch
import megatron.bridge.training.model_load_save, conversion.bridge
" || fail "Megatron-Bridge is installed and does not import, see above. Fix: the message names what is missing."
say "Megatron-Bridge $("$PYTHON" -c 'import importlib.metadata as m; print(m.version("megatron-bridge"))') is there"
