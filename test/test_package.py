"""What colcon and pip read: package.xml, setup.py, the wheel."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest
import yaml

import sparserefine_ros

ROOT = Path(__file__).resolve().parents[1]
NAME = "sparserefine_ros"

# Imported module -> rosdep key; None where there is none (named in a comment of package.xml).
ROSDEP: dict[str, str | None] = {
    "ament_index_python": "ament_index_python",
    "builtin_interfaces": "builtin_interfaces",
    "cv2": "python3-opencv",
    "diagnostic_msgs": "diagnostic_msgs",
    "huggingface_hub": None,
    "timm": None,
    "jinja2": "python3-jinja2",
    "launch": "launch",
    "launch_ros": "launch_ros",
    "matplotlib": "python3-matplotlib",
    "numpy": "python3-numpy",
    "onnx": None,
    "onnxruntime": None,
    "rcl_interfaces": "rcl_interfaces",
    "rclpy": "rclpy",
    "rich": "python3-rich",
    "rosbags": "python3-rosbags-pip",
    "safetensors": None,
    "sensor_msgs": "sensor_msgs",
    "std_msgs": "std_msgs",
    "std_srvs": "std_srvs",
    "lifecycle_msgs": "lifecycle_msgs",
    "torch": None,  # python3-torch is too old on Ubuntu 22.04; 24.04 has none, and rosdep would install nothing at all
    "transformers": None,
    "triton": None,
    "spconv": None,
    "torchsparse": None,
    "vision_msgs": "vision_msgs",
    "yaml": "python3-yaml",
}


def package_xml() -> ElementTree.Element:
    return ElementTree.parse(ROOT / "package.xml").getroot()


def imported_modules() -> set[str]:
    """Top-level names of everything that the package and its launch files import from elsewhere."""
    names: set[str] = set()
    for path in [*(ROOT / NAME).rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {NAME}


ROOMS = (
    "errors", "memory", "untrusted", "whole_files", "native", "sparse", "networks", "datasets", "segmenter",
    "evaluation", "training", "studies", "node", "benchmarks", "commands", "cli",
)  # fmt: skip
"""Of the package, each importing from those before it alone."""


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room: str) -> None:
    """The core runs without ROS, and the sparse engine without segmentation."""
    above = {f"{NAME}.{other}" for other in ROOMS[ROOMS.index(room) + 1 :]}
    folder = ROOT / NAME / room
    for path in folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            wrong = [name for name in names if ".".join(name.split(".")[:2]) in above]
            assert not wrong, f"{path}, line {node.lineno}"
            assert room == "node" or "rclpy" not in {name.split(".")[0] for name in names}, path


def test_every_room_is_listed() -> None:
    there = [path for path in (ROOT / NAME).iterdir() if path.is_dir() or path.suffix == ".py"]
    assert {path.stem for path in there if not path.name.startswith("_")} == set(ROOMS)


def test_every_import_is_a_declared_dependency() -> None:
    imported = imported_modules()
    assert imported - set(ROSDEP) == set(), "new import: add it to package.xml, setup.py and this table"
    declared = {element.text for element in package_xml().iter("exec_depend")}
    missing = {ROSDEP[name] for name in imported} - declared - {None}
    assert not missing
    assert "python3-torch" not in declared
    setup = (ROOT / "setup.py").read_text().lower()
    wheels = {"cv2": "opencv-python-headless", "yaml": "pyyaml"}
    for name in imported - {"torchsparse"}:  # has no wheel that setup.py could name
        key = ROSDEP[name] or "python3-"
        if key.startswith("python3-"):
            assert f'"{wheels.get(name, name)}' in setup, name


def test_progress_bars_need_no_newer_rich_than_ubuntu_22_04_has() -> None:
    """11.2, which `rosdep install` brings to humble."""
    had = {"BarColumn", "Progress", "TextColumn", "TimeElapsedColumn", "TimeRemainingColumn", "track"}
    used: set[str] = set()
    for path in (ROOT / NAME).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "rich.progress":
                used |= {alias.name for alias in node.names}
    assert used <= had


def test_package_xml_is_format_3_of_an_ament_python_package() -> None:
    root = package_xml()
    assert root.get("format") == "3"
    assert root.findtext("name") == NAME
    assert root.findtext("version") == sparserefine_ros.__version__
    assert root.findtext("export/build_type") == "ament_python"
    for tag in ("description", "maintainer", "license"):
        assert (root.findtext(tag) or "").strip()
    assert (ROOT / "resource" / NAME).read_bytes() == b""


def test_executables_go_where_ros_looks() -> None:
    text = (ROOT / "setup.cfg").read_text()
    assert f"script_dir=$base/lib/{NAME}" in text and f"install_scripts=$base/lib/{NAME}" in text


def test_rviz_configuration_shows_image_overlay_and_mask() -> None:
    config = yaml.safe_load((ROOT / "config" / "segment.rviz").read_text())
    displays = config["Visualization Manager"]["Displays"]
    shown = {d["Name"]: d["Topic"]["Value"] for d in displays if d["Enabled"]}
    assert shown == {"Image": "/image", "Overlay": "/segmentation/overlay", "Mask": "/segmentation/color"}
    assert {d["Class"] for d in displays} == {"rviz_default_plugins/Image"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the checkout, with a model folder in it."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("checkout")
    for item in ("package.xml", "setup.py", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / item, copy)
    for folder in (NAME, "launch", "config", "resource"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "models" / "example").mkdir(parents=True)
    (copy / "models" / "example" / "model.yaml").write_text("format: 1\n")
    (copy / "models" / ".cache").mkdir()
    (copy / "models" / ".cache" / "left.over").write_text("")
    code = "import setuptools.build_meta as b; b.build_wheel('dist')"
    result = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [path] = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_the_package_and_its_shared_files(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    data = f"{NAME}-{sparserefine_ros.__version__}.data/data/share"
    for path in (ROOT / NAME).rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    assert f"{NAME}/py.typed" in names
    for path in (ROOT / NAME / "evaluation" / "templates").iterdir():
        assert path.relative_to(ROOT).as_posix() in names
    expected = [
        "package.xml",
        "launch/segment.launch.py",
        "launch/evaluate.launch.py",
        "config/fastdds.xml",
        "config/segment.yaml",
    ]
    for name in [*expected, "config/segment.rviz", "models/example/model.yaml"]:
        assert f"{data}/{NAME}/{name}" in names
    assert f"{data}/ament_index/resource_index/packages/{NAME}" in names
    assert not [name for name in names if ".cache" in name or name.startswith(("test", "launch/", "config/"))]


def test_wheel_offers_both_executables(wheel: zipfile.ZipFile) -> None:
    [entry] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    lines = wheel.read(entry).decode().splitlines()
    assert f"segment = {NAME}.node.main:main" in lines
    assert f"sparserefine = {NAME}.cli:main" in lines
    [metadata] = [name for name in wheel.namelist() if name.endswith("METADATA")]
    text = wheel.read(metadata).decode()
    assert "Provides-Extra: ros" in text
    assert [int(minor) for minor in re.findall(r"^Classifier: .* Python :: 3\.(\d+)$", text, re.M)] == [10, 11, 12, 13]


def test_a_half_made_environment_is_made_again(tmp_path: Path) -> None:
    """As `python3 -m venv` leaves it where Debian's python3-venv is missing: a python, but no pip."""
    for folder in ("scripts", ".venv/bin", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    python = """#!/bin/sh
    echo "$0 $*" >>"$LOG"
    case "$*" in
        *find_spec*) exit 1 ;;
        "-m venv "*) cp "$0" .venv/bin/python ;;
    esac
    """
    (tmp_path / "bin" / "python3").write_text(python)
    (tmp_path / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    for file in (tmp_path / "bin" / "python3", tmp_path / ".venv" / "bin" / "python"):
        file.chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "LOG": str(tmp_path / "log")}
    done = subprocess.run(
        ["bash", str(tmp_path / "scripts" / "setup.sh")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text()
    assert f"{tmp_path}/bin/python3 -m venv .venv" in log
    assert "scripts/install.py --editable .[ros]" in log.splitlines()[-1]


def test_uv_is_told_what_pip_is_configured_with() -> None:
    install = runpy.run_path(str(ROOT / "scripts" / "install.py"))
    listed = """:env:.find-links='/wheels /more'
:env:.quiet='1'
global.cert='/ca.crt'
global.extra-index-url='https://a/simple\\nhttps://b/simple'
global.find-links='/elsewhere'
global.index-url='https://one/simple'
install.index-url='https://two/simple'"""
    options, variables = install["uv_options"](install["pip_settings"](listed))
    assert variables == {"SSL_CERT_FILE": "/ca.crt"}
    pairs = [*zip(options[::2], options[1::2], strict=True)]
    assert pairs[0] == ("--index-strategy", "unsafe-best-match")
    assert sorted(pairs[1:]) == [
        ("--default-index", "https://two/simple"),  # [install] counts before [global], the environment before both
        ("--find-links", "/more"),
        ("--find-links", "/wheels"),
        ("--index", "https://a/simple"),
        ("--index", "https://b/simple"),
    ]
    with pytest.raises(ValueError, match="pip is configured with no-binary"):
        install["uv_options"](install["pip_settings"]("global.no-binary=':all:'"))


def test_pip_installs_where_uv_fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / "install.py"))["main"]
    monkeypatch.setitem(main.__globals__, "uv_command", lambda _: (["false"], {}))
    monkeypatch.setattr(sys, "executable", "echo")
    assert main(["numpy"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "installing by pip: uv has failed",
        "-m pip --disable-pip-version-check install numpy",
    ]


def test_no_module_is_skipped_while_it_is_collected() -> None:
    """Under launch_testing's pytest plugin, hence under colcon, one such skip silently drops every test there is."""
    pattern = re.compile(r"^(?:\w+ = )?pytest\.(?:importorskip|skip)\((?!\"rclpy\"\))", re.MULTILINE)
    assert [path.name for path in (ROOT / "test").glob("*.py") if pattern.search(path.read_text())] == []
