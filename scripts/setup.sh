#!/usr/bin/env bash
# Make .venv with Python 3.12; install the project and its development tools at the versions of
# constraints.txt. A second run ends at once if nothing changed. Environment:
#   PYTHON=/path/to/python3.12   interpreter, default the first working one
#   VENV=DIR                     place of the environment, default .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
STAMP="$VENV/.mellum2-setup"

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] error: %s\n' "$*" >&2; exit 2; }
source scripts/install.sh

# megatron-core 0.19.2 ships its compiled dataset helpers for CPython 3.12 only. Every candidate is
# run: pyenv's shim of a version that is not selected exists on PATH and fails.
is_python312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_python312 "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.12." \
            "Fix: point PYTHON at one, or unset it."
        command -v "$PYTHON"
        return
    fi
    while IFS= read -r candidate; do
        if is_python312 "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done < <(
        type -aP python3.12 python3 python || true
        ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
            "$HOME"/.pyenv/versions/3.12*/bin/python \
            /opt/homebrew/bin/python3.12 /usr/local/bin/python3.12 2>/dev/null || true
    )
    if command -v uv >/dev/null 2>&1; then
        say "no Python 3.12 found, asking uv for one" >&2
        uv python install 3.12 >&2 && uv python find 3.12 && return
    fi
    fail "no working Python 3.12 found (PATH, pyenv's versions, uv). Fix: install one," \
        "for example 'apt install python3.12-venv', 'pyenv install 3.12' or" \
        "'uv python install 3.12', and run this again; or name it with PYTHON=/path/to/python3.12."
}

make_venv() {
    local python
    python=$(find_python)
    say "Python: $python"
    say "creating $VENV"
    # --clear: an environment that exists here is a half-made one (see the checks below).
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv --clear "$VENV"
    elif command -v uv >/dev/null 2>&1; then
        uv venv --quiet --clear --seed --python "$python" "$VENV"
    else
        fail "$python has no ensurepip, so it cannot make a virtual environment." \
            "Fix: 'apt install python3.12-venv'."
    fi
}

sum() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }
# The path is part of it: an environment that was moved no longer works.
fingerprint() {
    { cat pyproject.toml constraints.txt scripts/setup.sh scripts/install.sh && pwd; } | sum
}

if [ -e "$VENV/bin/python" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
    is_python312 "$VENV/bin/python" || fail "$VENV holds $("$VENV/bin/python" --version)," \
        "and Python 3.12 is needed. Fix: remove $VENV, or choose another place with VENV=DIR."
    if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; then
        say "$VENV is up to date"
        exit 0
    fi
elif [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ]; then
    fail "$VENV exists and is not a virtual environment." \
        "Fix: move it away, or choose another place with VENV=DIR."
else
    make_venv
fi
say "about 6.5 GB the first time, most of it torch and CUDA"
install_packages -c constraints.txt -e '.[dev]'
"$VENV/bin/mellum2" --help >/dev/null ||
    fail "the mellum2 command does not start. Fix: remove $VENV and run this again."
fingerprint >"$STAMP"
say "done: $VENV/bin/mellum2 --help"
