#!/usr/bin/env bash
# Add NeMo-Run to .venv at the versions of constraints.txt, for `mellum2 launch`. Run scripts/setup.sh first. Run it again
# at any time: it ends at once when NeMo-Run is there and imports.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
PYTHON=$VENV/bin/python

say() { printf '[setup-launch] %s\n' "$*"; }
fail() { printf '[setup-launch] error: %s\n' "$*" >&2; exit 2; }
source scripts/install.sh

[ -x "$PYTHON" ] || fail "$PYTHON does not exist. Fix: run 'make setup' first."
# Metadata answers in milliseconds; the import itself, half a minute on a slow disk, is tried once after installing.
installed() {
    "$PYTHON" - constraints.txt <<'EOF'
import importlib.metadata, sys
pins = dict(line.strip().split("==") for line in open(sys.argv[1]) if "==" in line)
try:
    same = all(importlib.metadata.version(name) == pins[name] for name in ("nemo-run", "leptonai", "torchx"))
except importlib.metadata.PackageNotFoundError:
    same = False
sys.exit(not same)
EOF
}
if installed; then
    say "NeMo-Run $("$PYTHON" -c 'import importlib.metadata as m; print(m.version("nemo-run"))') is there"
    exit 0
fi
install_packages -c constraints.txt -e '.[dev,launch]'
"$PYTHON" -c "import nemo_run" || fail "NeMo-Run was installed and does not import, see above. Fix: remove $VENV, then" \
    "'make setup-launch': an environment with other versions than constraints.txt's is the likely reason."
say "done: $VENV/bin/mellum2 launch --help"
