#!/usr/bin/env bash
# Style, types and architecture.
extra=dev
source "$(dirname "$0")/setup.sh"
cd "$here"
ruff check .
ruff format --check .
mypy
python -m pytest tests/test_architecture.py
