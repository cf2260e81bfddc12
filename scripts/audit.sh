#!/usr/bin/env bash
# Asks PyPI's advisory service, or OSV's, for known holes in what .venv holds. Needs the internet; --strict, because
# pip-audit passes over a package that it cannot look up and still ends with "none found".
# Ends with status 1 where there are holes, and with 3, saying so, where the service could not be asked.
#   scripts/audit.sh             scripts/audit.sh osv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
service="${1:-pypi}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# Our own package and torch's local version ("2.13.0+cpu") are unknown to the service.
.venv/bin/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$//' >"$work/list"
packages="$(wc -l <"$work/list")"
.venv/bin/python -m venv .venv/audit
.venv/audit/bin/python -m pip install --quiet pip-audit
if .venv/audit/bin/pip-audit --strict --no-deps --disable-pip --vulnerability-service "$service" \
    --requirement "$work/list" --output "$work/found" 2>"$work/said"; then
    echo "no known holes in $packages packages, says $service"
elif [ -s "$work/found" ]; then
    cat "$work/found"
    exit 1
else
    echo "NOT AUDITED: $service gave no answer, so nothing is known about these $packages packages. pip-audit said:" >&2
    tail -n 1 "$work/said" >&2
    exit 3
fi
