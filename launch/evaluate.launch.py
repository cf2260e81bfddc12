"""Replays a bag through the live node, writes what was measured as a page, and ends.

    ros2 launch sparserefine_ros evaluate.launch.py bag:=street_bag model:=street report:=street.html

`ros2 launch` exits with 0 when masks came back and the report is written, else with 1. This is `sparserefine evaluate`
under launch: the node runs as a process of its own in a ROS domain of its own, so that nothing else is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ament_index_python.packages import PackageNotFoundError, get_package_prefix
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, RegisterEventHandler, Shutdown
from launch.event_handlers import OnProcessExit
from launch.events.process import ProcessExited
from launch.substitutions import LaunchConfiguration

from sparserefine_ros.commands.evaluate import SEGMENTER_PARAMETERS
from sparserefine_ros.node.parameters import BY_NAME

OPTIONS = {
    "report": "Page to write, HTML; a folder gets report.html.",
    "json": "Where to write the numbers, for `sparserefine compare`; empty: nowhere.",
    "output": "Folder for a picture of some frames and the node's log; empty: none.",
    "rate": "1: the recording's timing; 2: twice as fast; 0: lossless, each frame waits for the mask before it.",
    "image_topic": "Image topic, where the bag has several.",
    "label_topic": "Ground-truth topic; empty: /camera/label.",
    "domain_id": "ROS domain of the replay; empty: a free one.",
}
"""Options of `sparserefine evaluate` that are arguments here; empty ones are left to it."""
DEFAULTS = {"report": "report.html", "rate": "1.0"}


def declared_arguments() -> list[DeclareLaunchArgument]:
    """The bag, options of the replay, then one for each parameter that decides the masks."""
    own = [DeclareLaunchArgument("bag", description="rosbag2 folder, or a single .mcap or .db3 file.")]
    own += [DeclareLaunchArgument(n, default_value=DEFAULTS.get(n, ""), description=d) for n, d in OPTIONS.items()]
    table = [
        DeclareLaunchArgument(
            p.name,
            default_value=str(p.default),
            description=p.description if p.choices else f"{p.description} ({p.values})",
            **({"choices": list(p.choices)} if p.choices else {}),
        )
        for p in map(BY_NAME.__getitem__, SEGMENTER_PARAMETERS)
    ]
    return own + table


def program() -> list[str]:
    """The executable in lib/sparserefine_ros after colcon, this Python's module after pip."""
    try:
        installed = Path(get_package_prefix("sparserefine_ros"), "lib", "sparserefine_ros", "sparserefine")
        if installed.is_file():
            return [str(installed)]
    except PackageNotFoundError:
        pass
    return [sys.executable, "-m", "sparserefine_ros.cli"]


def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The evaluation, and what follows its end."""
    given = {n: LaunchConfiguration(n).perform(context) for n in ("bag", *OPTIONS, *SEGMENTER_PARAMETERS)}
    # NAME=VALUE in one word: a value that begins with a dash stays a value
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value and name != "bag"]
    evaluation = ExecuteProcess(
        cmd=[*program(), "evaluate", *options, "--", given["bag"]], name="evaluate", output="screen"
    )

    def ended(event: ProcessExited, _: LaunchContext) -> Shutdown:
        if event.returncode != 0 and not context.is_shutdown:
            # Launch has no other way to end with a status: an error in a handler makes it 1.
            raise RuntimeError(f"the evaluation ended with status {event.returncode}; its output says why")
        return Shutdown(reason="the evaluation is done")

    return [evaluation, RegisterEventHandler(OnProcessExit(target_action=evaluation, on_exit=ended))]


def generate_launch_description() -> LaunchDescription:
    """Called by ros2 launch."""
    return LaunchDescription([*declared_arguments(), OpaqueFunction(function=start)])
