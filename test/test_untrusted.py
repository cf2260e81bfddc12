"""Small files of others: bounded before they are read, plain, and naming nothing elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from sparserefine_ros.datasets.folder import read_classes
from sparserefine_ros.errors import DatasetError, TrainingError
from sparserefine_ros.training.recipe import Recipe
from sparserefine_ros.untrusted import MAX_DEPTH, MAX_TEXT, beside, load_yaml, parse_yaml, read_text

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_plain_yaml_is_what_safe_load_reads() -> None:
    for text in ("a: [1, 2.5, x, null, true]\nb: {c: 2001-01-01}\n", "", "- - - 1", "a: |\n  text\n"):
        assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"alias \*a; write the values out"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", r"alias \*a"),
        ("a: &a [*a]", r"alias \*a"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than 32"),
        ("[" * 500_000, "nested more than 32"),
        ("{" * 33, "nested|while"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!int ''", "index"),
        ("!!timestamp 'x'", "."),
        ("a: [1", "while parsing"),
        ("\x00", "."),
    ],
)
def test_anything_else_is_a_value_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_as_deep_as_allowed() -> None:
    value = parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for _ in range(MAX_DEPTH - 1):
        [value] = value
    assert value == []


def test_size_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"x" * MAX_TEXT)
    assert read_text(file) == "x" * MAX_TEXT
    with file.open("ab") as stream:
        stream.truncate(2**40)  # a sparse terabyte
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        load_yaml(file)


def test_beside(tmp_path: Path) -> None:
    here = tmp_path / "here" / "model.yaml"
    here.parent.mkdir()
    for name in ("here/model.yaml", "here/weights", "out"):
        (tmp_path / name).write_text("")
    assert beside(here, "weights") == here.parent / "weights"
    for name in ("", ".", "..", "../out", "/etc/passwd", "a/b", "./weights", "weights/", "a\\b", 7, None, ["weights"]):
        with pytest.raises(ValueError, match="plain name"):
            beside(here, name)
    for target, error in ((tmp_path / "out", ValueError), ("/dev/zero", ValueError), ("weights", None)):
        (here.parent / "link").symlink_to(target)
        if error:
            with pytest.raises(error, match="leads out of"):
                beside(here, "link")
        else:
            assert beside(here, "link") == here.parent / "link"
        (here.parent / "link").unlink()
    os.mkfifo(here.parent / "pipe")
    (here.parent / "folder").mkdir()
    for name in ("pipe", "folder", "nothing"):
        with pytest.raises(FileNotFoundError, match=f"{name} is no file"):
            beside(here, name)


def test_classes_and_recipes_are_read_that_way(tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(LAUGHS)
    with pytest.raises(DatasetError, match=r"alias \*a"):
        read_classes(tmp_path / "bomb.yaml")
    with pytest.raises(TrainingError, match=r"alias \*a"):
        Recipe.load(tmp_path / "bomb.yaml")
