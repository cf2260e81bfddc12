#!/usr/bin/env bash
# Asks PyPI's advisory service, or OSV's, for known holes in what .venv holds. Needs the internet, so it is for a nightly
# job; --strict, because pip-audit passes over a package that it cannot look up and still ends with "none found".
#   scripts/audit.sh             scripts/audit.sh osv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
list="$(mktemp)"
trap 'rm -f "$list"' EXIT
# Our own package and torch's local version ("2.13.0+cpu") are unknown to the service.
.venv/bin/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$//' >"$list"
.venv/bin/python -m venv .venv/audit
.venv/audit/bin/python -m pip install --quiet pip-audit
.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --vulnerability-service "${1:-pypi}" --requirement "$list"
