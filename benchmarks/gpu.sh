#!/usr/bin/env bash
# benchmarks/gpu.sh [--tiny] [--within SECONDS] [--list] [STAGE ...]: see benchmarks/gpu.py
#   PYTHON  the interpreter that has torch (default: the one of `make setup`, else python3)
#   WHEELS  a folder of wheels to install first, beside that interpreter's own packages; no network is used
#   OUT     where results go (default: benchmarks/results)
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ ! -x .venv/bin/python ] || PYTHON=$PWD/.venv/bin/python
fi
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
"$PYTHON" benchmarks/gpu.py "$@"
