"""evaluate.launch.py: its arguments come from the table; it ends by itself, with the status of what it started."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch_program import LAUNCH

from sparserefine_ros.commands.evaluate import SEGMENTER_PARAMETERS
from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.evaluation.bag_writer import START_NS, BagWriter
from sparserefine_ros.node.parameters import BY_NAME, PARAMETERS

FILE = Path(__file__).resolve().parents[1] / "launch" / "evaluate.launch.py"
OWN = ["bag", "report", "json", "output", "rate", "image_topic", "label_topic", "domain_id"]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `ros2 launch` does."""
    environment = {**os.environ, "OVERRIDE_LAUNCH_PROCESS_OUTPUT": "screen", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LAUNCH, str(FILE), *arguments]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )


def test_no_parameter_is_spelled_in_the_launch_file() -> None:
    tree = ast.parse(FILE.read_text())
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not strings & {p.name for p in PARAMETERS}


def test_arguments_are_those_of_the_table() -> None:
    pytest.importorskip("launch_ros")
    spec = importlib.util.spec_from_file_location("evaluate_launch", FILE)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = {a.name: a for a in module.generate_launch_description().get_launch_arguments()}
    assert list(arguments) == [*OWN, *SEGMENTER_PARAMETERS]
    assert arguments["bag"].default_value is None
    for name in SEGMENTER_PARAMETERS:
        p = BY_NAME[name]
        assert [s.text for s in arguments[name].default_value] == [str(p.default)]
        assert arguments[name].description.startswith(p.description)
        assert tuple(arguments[name].choices or ()) == p.choices


def test_it_writes_the_report_and_ends(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("launch_ros")
    pytest.importorskip("rclpy")
    rng = np.random.default_rng(0)
    with BagWriter(tmp_path / "-bag", CAMVID) as writer:  # a name that an option parser could take for an option
        for i in range(3):
            image = rng.integers(0, 256, (48, 72, 3), np.uint8)
            writer.write(image, rng.integers(0, 11, (48, 72), np.uint8), START_NS + i * 100_000_000)
    done = launch(
        f"bag:={tmp_path / '-bag'}", f"model:={tiny_bundle}", f"report:={tmp_path / 'page'}",
        f"json:={tmp_path / 'r.json'}", "device:=cpu", "threads:=1", "rate:=0", "entropy_threshold:=0.25",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["mode"], result["entropy_threshold"], result["node_exit_code"]) == ("live", 0.25, 0)
    assert result["frames"] == {"sent": 3, "received": 3, "processed": 3, "dropped": 0}
    page = (tmp_path / "page" / "report.html").read_text()
    assert f"{100 * result['miou']:.2f} %" in page and "<title>tiny on -bag</title>" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bag:=nowhere"], ["there is no bag at nowhere", "the evaluation ended with status 2"]),
        (["bag:=x", "decoder:=magic"], ["magic", "sparserefine"]),
        ([], ["bag"]),
    ],
)
def test_a_failure_is_a_status(arguments: list[str], words: list[str]) -> None:
    pytest.importorskip("launch_ros")
    done = launch(*arguments)
    assert done.returncode == 1, done.stdout
    for word in words:
        assert word in done.stdout
