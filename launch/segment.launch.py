"""Starts the segment node, with the transport profile that camera images need, and rviz2 on request.

    ros2 launch sparserefine_ros segment.launch.py image:=/camera/image_raw decoder:=sparserefine rviz:=true

Every parameter of the node is an argument. An argument that is given wins over params_file; one that is not given
leaves params_file, or else the node's default, in force.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ament_index_python.packages import PackageNotFoundError, get_package_prefix
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, LogInfo, OpaqueFunction, SetEnvironmentVariable
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterFile, ParameterValue

from sparserefine_ros.memory import huge_pages_env
from sparserefine_ros.node.parameters import PARAMETERS
from sparserefine_ros.node.sources import RESULTS, shown
from sparserefine_ros.node.transport import config_file, profile_env

BOOLEANS = ["true", "false"]


def declared_arguments() -> list[DeclareLaunchArgument]:
    """Topic and file arguments, then one for each parameter of the table."""
    own = [
        DeclareLaunchArgument("image", default_value="image", description="Image topic to subscribe to."),
        DeclareLaunchArgument(
            "remappings", default_value="", description="Further topics, as FROM:=TO with spaces between them."
        ),
        DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node and its topics."),
        DeclareLaunchArgument("params_file", default_value="", description="YAML file with the node's parameters."),
        DeclareLaunchArgument(
            "use_sim_time", default_value="false", choices=BOOLEANS, description="Take the time from /clock."
        ),
        DeclareLaunchArgument(
            "rviz", default_value="false", choices=BOOLEANS, description="Show image, overlay and mask in rviz2."
        ),
        DeclareLaunchArgument("log_level", default_value="info", description="Severity of the node's log."),
    ]
    table = [
        DeclareLaunchArgument(
            p.name,
            default_value=str(p.default),
            description=p.description if p.choices else f"{p.description} ({p.values})",
            **({"choices": list(p.choices)} if p.choices else {}),
        )
        for p in PARAMETERS
    ]
    return own + table


def program() -> dict[str, Any]:
    """What to start: the executable in lib/sparserefine_ros after colcon, this Python's module after pip."""
    try:
        installed = Path(get_package_prefix("sparserefine_ros"), "lib", "sparserefine_ros", "segment")
        if installed.is_file():
            return {"package": "sparserefine_ros", "executable": "segment"}
    except PackageNotFoundError:
        pass
    return {"executable": sys.executable, "arguments": ["-m", "sparserefine_ros.node.main"]}


def generate_launch_description() -> LaunchDescription:
    """Called by ros2 launch."""
    given: set[str] = set()

    def note_given(context: LaunchContext) -> None:
        # Runs before the declarations fill in their defaults.
        given.update(context.launch_configurations)

    def start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
        image, namespace, file = (
            LaunchConfiguration(name).perform(context) for name in ("image", "namespace", "params_file")
        )
        if file and not Path(file).is_file():
            raise FileNotFoundError(f"params_file '{file}' does not exist; give a YAML file or leave it out")
        pairs = [tuple(pair.split(":=", 1)) for pair in LaunchConfiguration("remappings").perform(context).split()]
        if bad := [pair[0] for pair in pairs if len(pair) != 2]:
            raise ValueError(f"remappings has '{bad[0]}'; give FROM:=TO, with spaces between several")
        # Numbers and lists are read as YAML, so that `auto` stays a word; text stays text, even a model called 2024.
        kinds = {p.name: None if p.numeric or isinstance(p.default, list) else str for p in PARAMETERS}
        values = {name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, kind in kinds.items()}
        values["use_sim_time"] = ParameterValue(LaunchConfiguration("use_sim_time"), value_type=bool)
        chosen = {name: value for name, value in values.items() if name in given}
        segment = Node(
            **program(),
            name="segment",
            namespace=namespace,
            parameters=[*([ParameterFile(file)] if file else []), *([chosen] if chosen else [])],
            # the first that matches counts
            remappings=[*pairs, ("image", image), ("image/compressed", f"{image}/compressed")],
            ros_arguments=["--log-level", LaunchConfiguration("log_level")],
            additional_env=huge_pages_env(),
            output="screen",
            respawn=False,
        )
        # The shipped configuration has absolute topic names; the remappings lead them to this node's, of several
        # cameras to those of the first that is known by name.
        base = "/" + namespace.strip("/") if namespace.strip("/") else ""

        def full(topic: str) -> str:
            return topic if topic.startswith("/") else f"{base}/{topic}"

        camera = shown(context.launch_configurations)
        source, results = (camera.image, camera.results) if camera else (image, RESULTS)
        seen = {"image": image, **dict(reversed(pairs))}.get(source, source)  # of two pairs the first counts
        topics = ("mask", "color", "overlay")
        rviz = Node(
            package="rviz2",
            executable="rviz2",
            name="segment_rviz",
            arguments=["-d", str(config_file("segment.rviz"))],
            remappings=[
                ("/image", full(seen)),
                *((f"/segmentation/{topic}", full(f"{results}/{topic}")) for topic in topics),
            ],
            condition=IfCondition(LaunchConfiguration("rviz")),
        )
        pick = LogInfo(
            msg="rviz2 cannot know which camera to show, as they are found by a pattern: pick the topic "
            f"NAMESPACE/{RESULTS}/overlay of one in its display Overlay (ros2 topic list)",
            condition=IfCondition(LaunchConfiguration("rviz")),
        )
        return [segment, rviz, *([] if camera else [pick])]

    return LaunchDescription(
        [
            OpaqueFunction(function=note_given),
            *declared_arguments(),
            *(SetEnvironmentVariable(name, path) for name, path in profile_env().items()),
            OpaqueFunction(function=start),
        ]
    )
