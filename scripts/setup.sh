# Sourced by the other scripts: an own virtual environment with pinned versions, made once.
# Usage: source scripts/setup.sh [extra]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=".${1:+[$1]}"
stamp=".venv/.installed-${1:-base}-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python" >&2; exit 2; }
  echo "Installing wsi-pipeline into .venv (once, about half a minute) ..." >&2
  "$python" -m venv .venv
  .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e "$target"
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
