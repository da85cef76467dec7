#!/usr/bin/env bash
# Style, types and architecture.
source "$(dirname "$0")/setup.sh" dev
ruff check .
ruff format --check .
mypy
python -m pytest tests/test_architecture.py
