"""Class names and colours as latched messages."""

from __future__ import annotations

import json
from typing import Any

from sparserefine_ros.datasets.classes import ClassList

try:
    from vision_msgs.msg import LabelInfo, VisionClass
except ImportError:  # not among the ROS wheels on the Python package index
    LabelInfo = VisionClass = None

UNLABELLED = 255


def label_info(classes: ClassList, stamp: Any) -> Any:
    """vision_msgs/LabelInfo of the mask's ids; needs vision_msgs."""
    message = LabelInfo()
    message.header.stamp = stamp
    message.class_map = [VisionClass(class_id=i, class_name=name) for i, name in enumerate(classes.names)]
    message.threshold = 0.0  # every pixel gets its most probable class
    return message


def label_json(classes: ClassList) -> str:
    """The same with colours, which LabelInfo has no field for, as JSON text for std_msgs/String."""
    rows = [
        {"class_id": i, "class_name": name, "color": list(colour)}
        for i, (name, colour) in enumerate(zip(classes.names, classes.palette, strict=True))
    ]
    return json.dumps({"name": classes.name, "class_map": rows, "unlabeled": UNLABELLED})
