#!/usr/bin/env bash
# The nightly soak: the real node with a trivial model at 30 Hz for an hour, its rates, latencies, memory and handles
# recorded. Fails where frames are lost, or where memory or handles grow.
#   scripts/soak.sh [FILE] [SECONDS]      (default: soak.json, 3600)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
file="${1:-soak.json}"
bash scripts/setup.sh
.venv/bin/sparserefine bench node --duration "${2:-3600}" --json "$file"
.venv/bin/python - "$file" <<'PYTHON'
import json, sys
result = json.load(open(sys.argv[1]))
memory, frames = result["memory"], result["frames"]
grown = {name: memory[f"{name}_first_last"][1] - memory[f"{name}_first_last"][0] for name in ("rss_mb", "handles")}
height, width = result["camera"]["size"]
frame_mb = height * width * 3 / 2**20  # queues that once hold one frame more keep its buffer
wrong = [
    *(["frames were lost: %d of %d" % (frames["lost"], frames["sent"])] if frames["lost"] > 0.001 * frames["sent"] else []),
    *(["memory grew by %.1f MB in half the run" % grown["rss_mb"]] if grown["rss_mb"] > 2 * frame_mb + 1 else []),
    *(["handles grew by %d in half the run" % grown["handles"]] if grown["handles"] > 2 else []),
]
sys.exit("; ".join(wrong) or None)
PYTHON
