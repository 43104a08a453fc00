#!/bin/bash
# Install Slurm and munge from Debian's or Ubuntu's packages, for the tests marked `slurm`. No
# service is left running; the tests start their own. A second run changes nothing.
set -euo pipefail

missing=()
for program in munged slurmctld slurmd sbatch srun; do
  PATH="$PATH:/usr/sbin" command -v "$program" > /dev/null || missing+=("$program")
done
if [[ ${#missing[@]} -eq 0 ]]; then
  echo "Slurm and munge are there: $(PATH="$PATH:/usr/sbin" slurmctld -V)"
  exit 0
fi

if ! command -v apt-get > /dev/null; then
  echo "error: ${missing[*]} missing, and this machine has no apt-get." \
    "Fix: install Slurm and munge with its own packages." >&2
  exit 2
fi
as_root=()
if [[ $EUID -ne 0 ]]; then
  command -v sudo > /dev/null || {
    echo "error: ${missing[*]} missing. Fix: run this as root, or where sudo is." >&2
    exit 2
  }
  as_root=(sudo)
fi

# The packages start services, which have no configuration here, unless a policy forbids it: 101.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" > /dev/null
  "${as_root[@]}" chmod +x "$policy"
  trap '"${as_root[@]}" rm -f "$policy"' EXIT
fi
"${as_root[@]}" apt-get -o Acquire::Retries=3 update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 \
  install -y -qq --no-install-recommends slurm-wlm munge
PATH="$PATH:/usr/sbin" slurmctld -V
