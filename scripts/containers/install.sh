#!/usr/bin/env bash
# Install the project with Transformer Engine into /opt/mellum2, inside an image that is being
# built: Ubuntu 24.04 (its python3 is 3.12) with the CUDA 13 compiler. The Dockerfile and the
# Apptainer recipe both run it, so both have the versions of constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export DEBIAN_FRONTEND=noninteractive VENV=/opt/mellum2 PIP_NO_CACHE_DIR=1
apt-get update
apt-get install --yes --no-install-recommends \
    build-essential git libibverbs1 librdmacm1 python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -m venv "$VENV"
"$VENV/bin/python" -m pip install -c constraints.txt '.[data,stream,wandb]'
scripts/setup_te.sh
"$VENV/bin/mellum2" --version
