#!/usr/bin/env bash
# The whole test suite, in two processes; arguments go to pytest, e.g. bash scripts/test.sh -k blend, or -m slow.
extra=dev
source "$(dirname "$0")/setup.sh"
cd "$here"
if [ $# -eq 0 ]; then
  export OMP_NUM_THREADS=1  # or their threads wait for one another
  set -- -n 2 --dist worksteal
fi
exec python -m pytest "$@"
