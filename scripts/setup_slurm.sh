#!/bin/bash
# Install Slurm, munge and shellcheck from Debian's or Ubuntu's packages, for the tests marked
# `slurm`. No service is left running; the tests start their own. A second run changes nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/debian.sh"

mapfile -t missing < <(missing_programs munged slurmctld slurmd sbatch srun shellcheck)
if [[ ${#missing[@]} -gt 0 ]]; then
  install_packages "${missing[*]}" slurm-wlm munge shellcheck
fi
echo "Slurm, munge and shellcheck are there: $(PATH="$PATH:/usr/sbin" slurmctld -V)"
