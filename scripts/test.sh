#!/usr/bin/env bash
# Sets up .venv, then lints and tests.
#
#   bash scripts/test.sh                     the everyday suite
#   bash scripts/test.sh --all               the slow tests too (real kills, real tools)
#   bash scripts/test.sh tests/model -x      any further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
set_up requirements.txt requirements-extra.txt requirements-dev.txt
case " $* " in *" --all "*) set_up_beside requirements-transformers4.txt ;; esac

# One thread: tests start processes of their own, and two threads on a busy two-core machine can be ten times slower.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

if "$PYTHON" -m ruff --version >/dev/null 2>&1; then
    "$PYTHON" -m ruff check .
else
    echo "ruff is not installed beside $PYTHON: not linted"
fi
exec "$PYTHON" -m pytest "$@"
