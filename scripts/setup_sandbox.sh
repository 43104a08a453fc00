#!/bin/bash
# Install bubblewrap from Debian's or Ubuntu's packages: the sandbox of rewards that run programs
# (docs/rlvr.md). A second run changes nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/debian.sh"

if [[ -n $(missing_programs bwrap prlimit python3) ]]; then
  install_packages bubblewrap bubblewrap util-linux python3-minimal
fi
bwrap --version
