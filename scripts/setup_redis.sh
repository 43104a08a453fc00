#!/bin/bash
# Install Redis from Debian's or Ubuntu's packages, for the tests of data.feed=redis. No service is
# left running; the tests start their own. A second run changes nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/debian.sh"

if [[ -n $(missing_programs redis-server) ]]; then
  install_packages redis-server redis-server
fi
redis-server --version
