"""Publishing where DDS may refuse a message.

A writer gives a message up when its lock or its queue is taken for longer than it may block (Fast DDS: 100 ms): a
machine with no core to spare, a subscriber that stalls. rclpy then raises RCLError.
"""

from __future__ import annotations

from typing import Any

from sparserefine_ros.node.serialized import RCLError as Refusal
from sparserefine_ros.node.serialized import publish, publish_parts


def offer(publisher: Any, message: Any) -> bool:
    """Publishes a message: an object, bytes or `cdr.image_parts`. False where it was refused, which costs it alone."""
    try:
        if isinstance(message, tuple):
            publish_parts(publisher, *message)
        elif isinstance(message, (bytes, bytearray)):
            publish(publisher, message)
        else:
            publisher.publish(message)
    except Refusal:
        return False
    return True
