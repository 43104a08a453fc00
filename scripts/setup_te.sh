#!/usr/bin/env bash
# Add Transformer Engine to .venv, built here against the installed torch. Run scripts/setup.sh
# first. The first build takes about 12 minutes on two cores; pip keeps the wheel.
# Only running its modules needs a GPU. Without one the te backend's layout, keys and arguments are
# tested on modules that are constructed and not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
VERSION=2.20.2
PYTHON=$VENV/bin/python

say() { printf '[setup-te] %s\n' "$*"; }
fail() { printf '[setup-te] error: %s\n' "$*" >&2; exit 2; }

[ -x "$PYTHON" ] || fail "$PYTHON does not exist. Fix: run 'make setup' first."
works() {
    "$PYTHON" -c "import torch, transformer_engine.pytorch as te; assert te" >/dev/null 2>&1
}
if works; then
    version=$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("transformer_engine"))')
    say "Transformer Engine $version is there"
    exit 0
fi
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
[ -x "$CUDA_HOME/bin/nvcc" ] ||
    fail "no CUDA compiler at $CUDA_HOME. Fix: install the CUDA 13 toolkit, or set CUDA_HOME."

"$PYTHON" -m pip install --quiet nvidia-curand setuptools wheel ninja cmake pybind11 packaging
# Headers of cuDNN, NCCL and other libraries of torch lie in its wheels, not in the toolkit.
site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
CPATH=$(find "$site"/nvidia -maxdepth 2 -type d -name include | tr '\n' ':')${CPATH:-}
export CPATH CUDA_HOME NVTE_FRAMEWORK=pytorch MAX_JOBS="${MAX_JOBS:-$(nproc)}"
say "building Transformer Engine $VERSION (about 12 minutes on two cores)"
"$PYTHON" -m pip install --no-build-isolation -c constraints.txt \
    "transformer_engine[core_cu13,pytorch]==$VERSION" ||
    fail "the build failed, see above. Fix: check the compiler's message;" \
        "the build needs 8 GB of memory and 3 GB of disk."
works || fail "Transformer Engine was built and does not import." \
    "Fix: see the error of '$PYTHON -c \"import torch, transformer_engine.pytorch\"'."
say "done"
