#!/usr/bin/env bash
# Add Transformer Engine to .venv, built here against the installed torch. No GPU is needed to build it or to construct
# its modules, only to run them: this is how the te backend's layout, keys and arguments are tested without one.
# About 12 minutes on two cores the first time; pip keeps the wheel. Run scripts/setup.sh first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
VERSION=2.20.2
PYTHON=$VENV/bin/python

say() { printf '[setup-te] %s\n' "$*"; }
fail() { printf '[setup-te] error: %s\n' "$*" >&2; exit 2; }

[ -x "$PYTHON" ] || fail "$PYTHON does not exist. Fix: run 'make setup' first."
works() { "$PYTHON" -c "import torch, transformer_engine.pytorch as te; assert te" >/dev/null 2>&1; }
if works; then
    say "Transformer Engine $("$PYTHON" -c 'import importlib.metadata as m; print(m.version("transformer_engine"))') is there"
    exit 0
fi
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
[ -x "$CUDA_HOME/bin/nvcc" ] || fail "no CUDA compiler at $CUDA_HOME. Fix: install the CUDA 13 toolkit, or set CUDA_HOME."

"$PYTHON" -m pip install --quiet nvidia-curand setuptools wheel ninja cmake pybind11 packaging
# The headers of cuDNN, NCCL and the other libraries that torch brings lie in its wheels, not in the toolkit.
site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
CPATH=$(find "$site"/nvidia -maxdepth 2 -type d -name include | tr '\n' ':')${CPATH:-}
export CPATH CUDA_HOME NVTE_FRAMEWORK=pytorch MAX_JOBS="${MAX_JOBS:-$(nproc)}"
say "building Transformer Engine $VERSION (about 12 minutes on two cores)"
"$PYTHON" -m pip install --no-build-isolation -c constraints.txt "transformer_engine[core_cu13,pytorch]==$VERSION" ||
    fail "the build failed, see above. Fix: check the compiler's message; 8 GB of memory and 3 GB of disk are needed."
works || fail "Transformer Engine was built and does not import. Fix: '$PYTHON -c \"import torch, transformer_engine.pytorch\"' says why."
say "done"
