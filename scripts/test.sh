#!/usr/bin/env bash
# The whole test suite; arguments go to pytest, e.g. bash scripts/test.sh -k blend, or -m slow.
source "$(dirname "$0")/setup.sh" dev
exec python -m pytest "$@"
