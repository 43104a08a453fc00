# shellcheck shell=bash
# Sourced by the scripts that install Debian's or Ubuntu's packages for tests.

# missing_programs PROGRAM...: print those that are not there, a line each.
missing_programs() {
  local program
  for program in "$@"; do
    PATH="$PATH:/usr/sbin" command -v "$program" > /dev/null || printf '%s\n' "$program"
  done
}

# install_packages WHAT PACKAGE...: install them with apt-get as root, and start no service.
install_packages() {
  local what=$1 policy=/usr/sbin/policy-rc.d as_root=()
  shift
  if ! command -v apt-get > /dev/null; then
    echo "error: $what missing, and this machine has no apt-get." \
      "Fix: install it with the machine's own packages." >&2
    return 2
  fi
  if [[ $EUID -ne 0 ]]; then
    command -v sudo > /dev/null || {
      echo "error: $what missing. Fix: run this as root, or where sudo is." >&2
      return 2
    }
    as_root=(sudo)
  fi
  # The packages start services, which have no configuration here, unless a policy forbids it: 101.
  local ours=
  if [[ ! -e $policy ]]; then
    ours=yes
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" > /dev/null
    "${as_root[@]}" chmod +x "$policy"
  fi
  local code=0
  "${as_root[@]}" apt-get -o Acquire::Retries=3 update -qq &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 \
      install -y -qq --no-install-recommends "$@" || code=$?
  if [[ -n $ours ]]; then "${as_root[@]}" rm -f "$policy"; fi
  return "$code"
}
