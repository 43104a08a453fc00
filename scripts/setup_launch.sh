#!/usr/bin/env bash
# Add NeMo-Run to .venv at the versions of constraints.txt, for `mellum2 launch`. Run
# scripts/setup.sh first. A second run ends at once if the versions are those of constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
PYTHON=$VENV/bin/python

say() { printf '[setup-launch] %s\n' "$*"; }
fail() { printf '[setup-launch] error: %s\n' "$*" >&2; exit 2; }
source scripts/install.sh

[ -x "$PYTHON" ] || fail "$PYTHON does not exist. Fix: run 'make setup' first."
# Reads metadata, which takes milliseconds. The import takes half a minute on a slow disk and is
# tried only once, after the installation.
installed() {
    "$PYTHON" - constraints.txt <<'EOF'
import importlib.metadata, sys
pins = dict(line.strip().split("==") for line in open(sys.argv[1]) if "==" in line)
try:
    names = ("nemo-run", "leptonai", "torchx")
    same = all(importlib.metadata.version(name) == pins[name] for name in names)
except importlib.metadata.PackageNotFoundError:
    same = False
sys.exit(not same)
EOF
}
if installed; then
    version=$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("nemo-run"))')
    say "NeMo-Run $version is there"
    exit 0
fi
install_packages -c constraints.txt -e '.[dev,launch]'
"$PYTHON" -c "import nemo_run" ||
    fail "NeMo-Run was installed and does not import, see above. The likely cause: an environment" \
        "with other versions than constraints.txt. Fix: remove $VENV, then 'make setup-launch'."
say "done: $VENV/bin/mellum2 launch --help"
