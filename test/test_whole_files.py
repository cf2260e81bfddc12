"""Output that cannot be written, or not to its end: one line that names the file, and what was there before stays."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import disk_with

from sparserefine_ros.cli import main
from sparserefine_ros.commands.bench import write_card
from sparserefine_ros.evaluation import files
from sparserefine_ros.segmenter.bundle import Bundle
from sparserefine_ros.whole_files import whole, write_whole


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    write_whole(file, b"before")
    file.chmod(0o640)
    with disk_with(1000), pytest.raises(OSError, match=f"'{file}'"):
        write_whole(file, bytes(2000))
    with pytest.raises(KeyboardInterrupt), whole(file) as partial:
        partial.write_bytes(b"half")
        assert partial.parent == tmp_path and partial.suffix == ".bin"
        raise KeyboardInterrupt
    assert files_in(tmp_path) == {"a.bin": b"before"}
    with whole(file) as one, whole(file) as other:  # by two threads, or in two containers that share a folder
        one.write_bytes(b"the last one wins")
        other.write_bytes(b"early")
    assert files_in(tmp_path) == {"a.bin": b"the last one wins"}
    with pytest.raises(FileNotFoundError, match="nowhere"), whole(file):  # of another file: it is the one named
        (tmp_path / "nowhere").read_bytes()
    write_whole(file, b"after")
    assert files_in(tmp_path) == {"a.bin": b"after"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    with pytest.raises(OSError, match=f"'{tmp_path / 'gone' / 'b'}'"):
        write_whole(tmp_path / "gone" / "b", b"")


def test_links_stay_links_and_devices_are_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store" / "real")
    for content in (b"one", b"two"):  # where it leads nowhere yet, and where there is a file
        write_whole(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "store" / "real").read_bytes() == content
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_whole(Path("/dev/full"), b"x")
    write_whole(Path("/dev/null"), b"x")
    assert not Path("/dev/null").is_file()
    read, write = os.pipe()
    write_whole(Path(f"/dev/fd/{write}"), b"through a pipe")
    os.close(write)
    assert os.read(read, 100) == b"through a pipe"
    os.close(read)
    with (tmp_path / "log").open("wb") as log:  # what a shell's > file has open
        write_whole(Path(f"/dev/fd/{log.fileno()}"), b"into the open file")
        assert os.fstat(log.fileno()).st_size == 18


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_write_protected_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"kept")
    (tmp_path / "a").chmod(0o444)
    with pytest.raises(PermissionError, match="'.*/a'"):
        write_whole(tmp_path / "a", b"lost")
    assert files_in(tmp_path) == {"a": b"kept"}


def test_segment_and_results(tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "p.png"), picture)
    words = ["segment", str(tmp_path / "p.png"), "--model", str(tiny_bundle), "--device", "cpu", "--output"]
    with disk_with(100):
        assert main([*words, str(tmp_path / "masks")]) == 2
    assert files_in(tmp_path / "masks") == {}
    assert main([*words, "/dev/full"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: cannot write {tmp_path / 'masks' / 'p_mask.png'}: File too large; make room")
    assert second == "error: cannot make the folder /dev/full: File exists; give another"
    files.write_text(tmp_path / "r.json", "{}")
    with disk_with(100), pytest.raises(files.ResultError, match=r"cannot write .*r.json: .*; make room"):
        files.write_text(tmp_path / "r.json", "x" * 200)
    write_card(tmp_path / "README.md", "| a |")
    card = (tmp_path / "README.md").read_bytes()
    with disk_with(100), pytest.raises(files.ResultError, match="cannot write .*README.md"):
        write_card(tmp_path / "README.md", "x" * 200)
    assert (tmp_path / "r.json").read_text() == "{}" and (tmp_path / "README.md").read_bytes() == card


def test_what_is_printed(tmp_path: Path, tiny_bundle: Path) -> None:
    """It is kept to the end, where an interpreter would complain in its own words."""
    shutil.copytree(tiny_bundle, tmp_path / "tiny")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "sparserefine_ros.cli", "rehash", str(tmp_path / "tiny")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device: 'standard output'\n")


def test_export_and_import(tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    export = ["export", str(tiny_bundle), "--what", "dense", "--external-data", "--output", str(tmp_path / "onnx")]
    with disk_with(20_000):  # its weights are larger
        assert main(export) == 2
    assert files_in(tmp_path / "onnx") == {} and list((tmp_path / "onnx").iterdir()) == []
    assert main(["export", str(tiny_bundle), "--output", "/dev/full"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(f"'{tmp_path / 'onnx' / 'dense.onnx'}'")
    assert second == "error: cannot make the folder /dev/full: File exists; give another"
    assert main(export) == 0 and main([*export, "--half"]) == 0  # over what is there
    assert set(files_in(tmp_path / "onnx")) == {"dense.onnx", "dense.onnx.data"}
    assert main([*export[:4], "--output", str(tmp_path / "onnx")]) == 0
    words = ["import", str(tmp_path / "onnx" / "dense.onnx"), "--classes", "camvid", "--name", "copy"]
    words += ["--models", str(tmp_path), "--native-size", "64x96"]
    copy = tmp_path / "copy"
    (copy / "README.md").mkdir(parents=True)  # what cannot be replaced by the card
    (copy / "import.txt").touch()  # of an import that was cut off
    assert main(words) == 2
    assert not (copy / "model.yaml").exists()  # no bundle yet: the same command may be given again
    (copy / "README.md").rmdir()
    assert main(words) == 0
    assert Bundle.load(copy).dense.network == "onnx"
    assert {"README.md", "import.txt", "model.yaml", "dense.onnx"} == set(files_in(copy))
    assert str(copy / "README.md") in capsys.readouterr().err
