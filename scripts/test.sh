#!/usr/bin/env bash
# Sets up .venv, then runs linters, type checks and the tests. Arguments go to pytest, which has two
# processes unless they say otherwise: scripts/test.sh -k sparse -n 0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh test,lint
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest --numprocesses 2 "$@"
