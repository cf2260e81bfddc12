"""The segmenter alone over a bag, without ROS: what the live node's masks must equal.

Shape shorthand: H, W image height and width in pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from sparserefine_ros.errors import FrameError
from sparserefine_ros.evaluation.bags import Bag
from sparserefine_ros.evaluation.mask_spool import MaskSpool
from sparserefine_ros.evaluation.replay_metrics import ReplayLog
from sparserefine_ros.segmenter.segmenter import Segmenter

Decode = Callable[[Any], np.ndarray]
"""A sensor_msgs Image or CompressedImage to RGB [H, W, 3] uint8; raises FrameError."""

logger = logging.getLogger(__name__)


def segment_bag(
    bag: Bag,
    segmenter: Segmenter,
    decode: Decode,
    spool: MaskSpool,
    progress: Callable[[ReplayLog], None] = lambda log: None,
) -> ReplayLog:
    """Masks of all frames into ``spool``; the log times each call of the segmenter.

    A frame that cannot be decoded or segmented is counted as malformed, as the node does, and costs that frame only.
    """
    log = ReplayLog(counters={"received": 0, "processed": 0, "dropped": 0, "malformed": 0})
    assert log.counters is not None
    for stamp, message in bag.image_messages():
        log.sent[stamp] = time.monotonic()
        log.counters["received"] += 1
        try:
            image = decode(message)
            log.sent[stamp] = time.monotonic()
            result = segmenter.segment([image])[0]
        except FrameError as error:
            logger.warning("frame at stamp %d ns left out: %s", stamp, error)
            log.counters["malformed"] += 1
            continue
        log.answered[stamp] = time.monotonic()
        log.counters["processed"] += 1
        log.density[stamp] = result.density
        log.stage_ms[stamp] = dict(result.stage_ms)
        spool.put_mask(stamp, result.mask)
        progress(log)
    return log


def selected_pixels(bag: Bag, segmenter: Segmenter, decode: Decode, stamps: Collection[int]) -> dict[int, np.ndarray]:
    """For the frames with these stamps, [H, W] bool: where the initial prediction's entropy exceeds the threshold."""
    wanted = set(stamps)
    found: dict[int, np.ndarray] = {}
    for stamp, message in bag.image_messages():
        if stamp in wanted:
            found[stamp] = segmenter.segment([decode(message)])[0].entropy > segmenter.entropy_threshold
            wanted.discard(stamp)
        if not wanted:
            break
    return found
