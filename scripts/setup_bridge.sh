#!/usr/bin/env bash
# Add Megatron-Bridge to .venv. Needs Transformer Engine (run scripts/setup_te.sh first), no GPU.
# Every package of constraints-bridge.txt is installed without its dependencies, so that no
# installed package changes its version.
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

# Print the pins that are not met: `unmet absent` the packages that are not installed, `unmet other`
# those in another version, which another file pins.
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
[ -z "$other" ] || say "not changed, though $PINS has another version: $(echo $other)"
if [ -n "$absent" ]; then
    say "installing $(echo $absent)"
    # shellcheck disable=SC2086  # one word a package
    "$PYTHON" -m pip install --quiet --no-deps $absent
fi
"$PYTHON" -W ignore -c "
import torch
import megatron.bridge.training.model_load_save, conversion.bridge
" || fail "Megatron-Bridge is installed and does not import, see above." \
    "Fix: install the package that the message names."
version=$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("megatron-bridge"))')
say "Megatron-Bridge $version is there"
