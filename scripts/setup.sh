#!/usr/bin/env bash
# Sets up .venv beside this checkout: the package itself (editable), its dependencies and, unless ROS 2 is sourced, ROS 2
# from wheels. Running it again is cheap.
#   scripts/setup.sh [test]       "test" adds what the tests and linters need
#   PYTHON=python3.12             the interpreter to build on (default: python3)
#   TORCH=torch==2.9.0            another torch; one that the interpreter already has is kept
#   SET_UP=1                      it has been done: scripts that begin with it go on at once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -z "${SET_UP:-}" ] || exit 0
extras="${1:-}"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
    echo "error: $("$python" --version) is not supported; set PYTHON to one from 3.10 to 3.13" >&2
    exit 1
}

# What the system brings is used, never replaced: a sourced ROS 2, and the torch of a Jetson.
has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }
options=()
if [ -n "${ROS_DISTRO:-}" ] && has rclpy; then
    echo "ROS 2 $ROS_DISTRO is sourced: using it"
    options+=(--system-site-packages)
else
    extras="ros${extras:+,$extras}"
    has torch && options+=(--system-site-packages)
fi

# Asked for pip: without Debian's python3-venv there is a .venv after the first try, but none that works.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv "${options[@]}" .venv
install=(.venv/bin/python scripts/install.py)
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    "${install[@]}" "${TORCH:-torch==2.13.0}"
fi
"${install[@]}" --editable ".${extras:+[$extras]}"
echo "ready: .venv/bin/sparserefine, .venv/bin/segment"
