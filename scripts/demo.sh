#!/usr/bin/env bash
# The main job on a fresh machine: sets up .venv, then makes a street bag, replays it through the live node and
# evaluates it. Needs Python 3.10 or later with pip. Leaves demo_output/. Arguments go to `sparserefine demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/sparserefine demo "$@"
