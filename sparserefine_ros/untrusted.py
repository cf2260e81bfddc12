"""Small files that somebody else may have written: their size is known before they are read, and what they name stays
beside them. Names in them are shown in terminals as text.
"""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

import yaml

MAX_TEXT = 2**20
"""Bytes of the largest YAML or JSON file read: 1 MiB; a bundle's has 4 kB."""
MAX_DEPTH = 32
"""Levels to which YAML may be nested; libyaml recurses without looking at the stack."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_text(file: Path) -> str:
    """The UTF-8 text of ``file``; OSError where it cannot be read, ValueError where it is too large or no text."""
    with file.open("rb") as stream:
        content = stream.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise ValueError(f"{file} has more than {MAX_TEXT} bytes, the largest size that is read")
    return content.decode()


def load_yaml(file: Path) -> Any:
    """What ``file`` says; OSError where it cannot be read, ValueError for anything that is no plain YAML."""
    return parse_yaml(read_text(file))


def parse_yaml(text: str) -> Any:
    """What ``text`` says, read by the safe loader; ValueError for what is no YAML, for aliases and deep nesting.

    Nine lines of aliases to aliases stand for 10^9 values, as soon as anything compares or prints them.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"alias *{event.anchor:.40}; write the values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        return yaml.load(text, Loader=_LOADER)  # noqa: S506  the C or Python safe loader
    except ValueError:
        raise
    except Exception as error:  # besides YAMLError PyYAML lets IndexError, KeyError, AttributeError, ... pass
        raise ValueError(f"{error}" or type(error).__name__) from error


def beside(file: Path, name: Any) -> Path:
    """The regular file ``name`` in the folder of ``file``; links are followed, for both must end in one folder.

    A colcon workspace built with --symlink-install has links to a whole bundle; a link to anywhere else is refused.
    Raises ValueError where ``name`` is no plain file name or leads elsewhere, FileNotFoundError where there is none.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or PurePath(name).name != name or "\\" in name:
        raise ValueError(f"{name!r:.80} must be the plain name of a file in {file.parent}")
    path = file.parent / name
    if path.resolve().parent != file.resolve().parent:
        raise ValueError(f"{path} is a link that leads out of {file.parent}; put the file itself there")
    if not path.is_file():  # nothing there, a folder, a device, a pipe that would never end
        raise FileNotFoundError(f"{path} is no file")
    return path


def printable(text: str) -> str:
    """``text`` with control characters spelled out: a terminal would obey them, and hide or alter what it shows."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
