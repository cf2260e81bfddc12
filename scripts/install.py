"""Installs what its arguments name into the environment of the Python that runs it: `python scripts/install.py numpy`.

By uv, which takes a fifth of pip's time, told what pip is configured with (a mirror, wheels in a folder, a
certificate); by pip itself where uv cannot stand in for it, or fails.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

OPTIONS = {  # of pip's configuration: uv's name
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
    "constraint": "--constraints",
}
VARIABLES = {"cert": "SSL_CERT_FILE", "timeout": "UV_HTTP_TIMEOUT", "default-timeout": "UV_HTTP_TIMEOUT"}
WITHOUT_EFFECT = {  # on what is installed, and where
    "break-system-packages",
    "cache-dir",
    "config-file",
    "disable-pip-version-check",
    "no-cache-dir",
    "no-color",
    "no-compile",
    "no-input",
    "no-warn-script-location",
    "progress-bar",
    "quiet",
    "require-virtualenv",
    "retries",
    "root-user-action",
    "verbose",
}


def pip_settings(listed: str) -> dict[str, str]:
    """What `pip config list` printed, lines of section.name='value', as pip install sees it: name -> value."""
    settings = {}
    lines = [line.partition("=") for line in listed.splitlines()]
    for section in ("global", "install", ":env:"):  # the later one counts
        for key, _, value in lines:
            if key.startswith(f"{section}."):
                settings[key.removeprefix(f"{section}.")] = ast.literal_eval(value)
    return settings


def uv_options(settings: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The same for uv: options and environment variables. Raises ValueError for a setting it has no equivalent of."""
    options = ["--index-strategy", "unsafe-best-match"]  # pip's way: the best of all indexes, not of the first
    variables = {}
    for name, value in settings.items():
        if name in OPTIONS:
            options += [word for each in value.split() for word in (OPTIONS[name], each)]
        elif name in VARIABLES:
            variables[VARIABLES[name]] = value
        elif name not in WITHOUT_EFFECT:
            raise ValueError(f"pip is configured with {name}")
    return options, variables


def uv_command(pip: list[str]) -> tuple[list[str], dict[str, str]]:
    """`uv pip install` into this environment, and its variables. Raises ValueError where pip has to do it."""
    venv = Path(sys.prefix, "pyvenv.cfg")
    if not venv.is_file() or "include-system-site-packages = true" in venv.read_text():
        raise ValueError("uv would not see the system's packages")
    listed = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=True).stdout
    options, variables = uv_options(pip_settings(listed))
    if not find_spec("uv") and subprocess.run([*pip, "install", "--quiet", "uv"], stderr=subprocess.DEVNULL).returncode:
        raise ValueError("uv cannot be installed")
    return [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, *options], variables


def main(arguments: list[str]) -> int:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    try:
        command, variables = uv_command(pip)
        if subprocess.run([*command, *arguments], env={**os.environ, **variables}).returncode == 0:
            return 0
        reason = "uv has failed"
    except ValueError as error:
        reason = str(error)
    print(f"installing by pip: {reason}", flush=True)
    return subprocess.run([*pip, "install", *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
