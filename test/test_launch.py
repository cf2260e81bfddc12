"""The launch file: without ROS its source, with ROS's launch its arguments and a real start."""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch_program import LAUNCH

from sparserefine_ros.node.parameters import PARAMETERS

FILE = Path(__file__).resolve().parents[1] / "launch" / "segment.launch.py"
OWN = ["image", "remappings", "namespace", "params_file", "use_sim_time", "rviz", "log_level"]


def test_no_parameter_is_spelled_in_the_launch_file() -> None:
    """Names, defaults and choices come from the table alone."""
    tree = ast.parse(FILE.read_text())
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not strings & {p.name for p in PARAMETERS}
    imports = {
        (node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert ("sparserefine_ros.node.parameters", "PARAMETERS") in imports
    assert ("sparserefine_ros.node.transport", "profile_env") in imports


def description() -> Any:
    pytest.importorskip("launch_ros")
    spec = importlib.util.spec_from_file_location("segment_launch", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate_launch_description()


def test_arguments_are_those_of_the_table() -> None:
    arguments = {a.name: a for a in description().get_launch_arguments()}
    assert list(arguments) == [*OWN, *(p.name for p in PARAMETERS)]
    for p in PARAMETERS:
        argument = arguments[p.name]
        assert [s.text for s in argument.default_value] == [str(p.default)]
        assert argument.description.startswith(p.description)
        assert tuple(argument.choices or ()) == p.choices
    for name in OWN:
        assert len(arguments[name].description) > 20


@pytest.mark.parametrize(
    ("given", "image", "results"),
    [
        ({"image": "/camera/image_raw", "namespace": "robot"}, "/camera/image_raw", "/robot/segmentation"),
        ({"image": "cam"}, "/cam", "/segmentation"),
        ({"cameras": "[front, left]", "namespace": "/robot/"}, "/robot/front/image", "/robot/front/segmentation"),
        ({"cameras": "[front]", "remappings": "front/image:=/cam0"}, "/cam0", "/front/segmentation"),
        ({"cameras": "['/a/*/image', '/b/c/image']"}, "/b/c/image", "/b/c/segmentation"),
        ({"cameras": "['/a/*/image']"}, None, None),
    ],
)
def test_rviz_shows_the_first_camera(given: dict[str, str], image: str | None, results: str | None) -> None:
    pytest.importorskip("launch_ros")
    from launch import LaunchContext
    from launch.actions import LogInfo
    from launch_ros.actions import Node

    context, started = LaunchContext(), []
    context.launch_configurations.update({**given, "rviz": "true"})
    for entity in description().entities:
        started += entity.visit(context) or []
    said = [action for action in started if isinstance(action, LogInfo)]
    if image is None:
        assert len(said) == 1 and "pick the topic NAMESPACE/segmentation/overlay" in said[0].msg[0].text
        return
    assert not said
    _, rviz = (action for action in started if isinstance(action, Node))
    rviz._perform_substitutions(context)
    assert dict(rviz.expanded_remapping_rules) == {
        "/image": image, **{f"/segmentation/{topic}": f"{results}/{topic}" for topic in ("mask", "color", "overlay")}
    }  # fmt: skip


def launch(log: Path, domain: int, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "OVERRIDE_LAUNCH_PROCESS_OUTPUT": "screen"}
    command = [sys.executable, "-c", LAUNCH, str(FILE), *arguments]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def test_a_real_start(tiny_bundle: Path, tmp_path: Path) -> None:
    """Arguments win over params_file, that over defaults; profile and huge pages are set; SIGINT ends all cleanly."""
    pytest.importorskip("launch_ros")
    pytest.importorskip("rclpy")
    from ros_client import TIMEOUT_S, Client, double, isolated, text
    from sensor_msgs.msg import Image

    params = tmp_path / "params.yaml"
    values = ("entropy_threshold: 0.7", "overlay_opacity: 0.3", "threads: 1")
    params.write_text("\n    ".join(["/**:\n  ros__parameters:", *values]) + "\n")
    log = tmp_path / "log.txt"
    with isolated(tmp_path) as domain:
        started = launch(
            log, domain, f"model:={tiny_bundle}", f"params_file:={params}", "entropy_threshold:=0.25",
            "image:=/camera/image_raw", "namespace:=robot", "device:=cpu",
        )  # fmt: skip
        client = Client(domain, "/robot")
        try:
            client.alive = lambda: _alive(started, log)
            client.publisher(Image, "/camera/image_raw")
            assert client.get("entropy_threshold") == double(0.25)
            assert client.get("overlay_opacity") == double(0.3)
            assert client.get("threads").integer_value == 1
            assert client.get("queue") == text("newest")
            assert client.get("model") == text(str(tiny_bundle))
            assert client.get("use_sim_time").bool_value is False
            (child,) = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
            assert b"glibc.malloc.hugetlb=1" in Path(f"/proc/{child}/environ").read_bytes()
        finally:
            started.send_signal(signal.SIGINT)
            code = started.wait(TIMEOUT_S)
            client.close()
    said = log.read_text()
    assert code == 0, said
    assert "process has finished cleanly" in said and "terminate called" not in said and "will lose" not in said


def _alive(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.poll() is None, log.read_text()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("decoder:=offset", ["decoder", "offset", "sparserefine"]),
        ("params_file:=nowhere.yaml", ["nowhere.yaml", "does not exist"]),
        ("remappings:=front/image=/cam", ["front/image=/cam", "FROM:=TO"]),
    ],
)
def test_a_bad_argument_fails_with_its_value(tmp_path: Path, argument: str, words: list[str]) -> None:
    pytest.importorskip("launch_ros")
    log = tmp_path / "log.txt"
    process = launch(log, 1, argument)
    assert process.wait(20) != 0
    said = log.read_text()
    for word in words:
        assert word in said, said
