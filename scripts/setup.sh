# Sourced by the other scripts: an own virtual environment with pinned versions, made once.
# Usage: extra=dev source scripts/setup.sh   (extra: an optional dependency group of pyproject.toml)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extra=${extra:-}
stamp="$here/.venv/.installed-${extra:-base}-$(cat "$here/pyproject.toml" "$here/constraints.txt" | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python" >&2; exit 2; }
  echo "Installing wsi-pipeline into .venv (once, about half a minute) ..." >&2
  "$python" -m venv "$here/.venv"
  "$here/.venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$here/constraints.txt" \
    -e "$here${extra:+[$extra]}"
  touch "$stamp"
fi
export PATH="$here/.venv/bin:$PATH"
