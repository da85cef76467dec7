#!/usr/bin/env bash
# The whole test suite; arguments go to pytest, e.g. bash scripts/test.sh -k blend, or -m slow.
extra=dev
source "$(dirname "$0")/setup.sh"
cd "$here"
exec python -m pytest "$@"
