#!/usr/bin/env bash
# The whole test suite, on two cores; arguments go to pytest, e.g. bash scripts/test.sh -k blend, or -m slow.
extra=dev
source "$(dirname "$0")/setup.sh"
cd "$here"
[ $# -gt 0 ] || set -- -n 2 --dist worksteal
exec python -m pytest "$@"
