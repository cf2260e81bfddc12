#!/usr/bin/env bash
# What takes too long for every change: fuzzing, signals at random moments, a thousand start-stops, an hour's soak.
# Each leaves its figures in the folder; ends with status 1 where one fails, after all have run.
#   scripts/nightly.sh [FOLDER] [SOAK_SECONDS]      (default: nightly/, 3600)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="$(mkdir -p "${1:-nightly}" && cd "${1:-nightly}" && pwd)"
bash scripts/setup.sh test
failed=0
part() { # NAME COMMAND...: its output goes to NAME.txt
    local name="$1"
    shift
    echo "$name ..."
    if "$@" >"$folder/$name.txt" 2>&1; then echo "$name: ok"; else
        echo "$name: FAILED, see $folder/$name.txt"
        failed=1
    fi
}
part fuzz .venv/bin/python scripts/fuzz.py --seconds 600
part signals env SPARSEREFINE_RANDOM_SIGNALS=100 .venv/bin/python -m pytest -q test/test_faults_process.py
part start_stops .venv/bin/python scripts/start_stops.py --lives 1000 --processes 20 --json "$folder/start_stops.json"
part soak bash scripts/soak.sh "$folder/soak.json" "${2:-3600}"
exit "$failed"
