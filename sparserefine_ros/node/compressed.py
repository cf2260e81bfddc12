"""What a JPEG or PNG says about itself, read before it is decoded.

A few bytes can announce an image of gigabytes, and decoders fill the missing part of a truncated image with
grey. So size and completeness are checked here, on the markers.
"""

from __future__ import annotations

import re

import numpy as np

from sparserefine_ros.errors import FrameError

_PNG = b"\x89PNG\r\n\x1a\n"
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_JPEG = b"\xff\xd8\xff"
# Start-of-frame markers of ITU T.81 table B.1: all of C0-CF but DHT (C4), JPG (C8) and DAC (CC).
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA
MAX_SCANS = 32
"""Scans of the largest JPEG: a progressive one has about ten, and each costs a pass over all pixels."""


def compressed_size(data: np.ndarray, format_text: str) -> tuple[int, int]:
    """(height, width) of a complete JPEG or PNG in `data` [N] uint8; FrameError for anything else."""
    content = data.tobytes()
    if content.startswith(_PNG):
        return _png_size(content)
    if content.startswith(_JPEG):
        return _jpeg_size(content)
    raise FrameError(
        f"compressed image with format {format_text!r:.80} starts with bytes {content[:4].hex(' ') or '(none)'}, "
        "which is neither JPEG nor PNG; publish 'jpeg' or 'png'"
    )


def bayer_of(format_text: str) -> str:
    """The pattern ("rggb") when `format` names a Bayer encoding as image_transport writes it, else ""."""
    found = re.match(r"\s*bayer_(rggb|bggr|gbrg|grbg)(8|16)\s*(;|$)", format_text)
    return found[1] if found else ""


def _png_size(content: bytes) -> tuple[int, int]:
    """Every chunk must lie inside ``content``: decoders make room for what a chunk announces, 4 GB of 100 bytes."""
    size: tuple[int, int] | None = None
    at = len(_PNG)
    while at + 12 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if kind in _ANIMATION:
            raise FrameError("PNG is animated; publish one image a message")
        if kind == b"IHDR" and size is None and length == 13:
            size = int.from_bytes(content[at + 12 : at + 16], "big"), int.from_bytes(content[at + 8 : at + 12], "big")
        at += 12 + length
        if size is None or at > len(content):
            break
        if kind == b"IEND":
            return size
    raise FrameError(f"PNG of {len(content)} bytes is truncated or corrupt; check the driver or the transport")


def _jpeg_size(content: bytes) -> tuple[int, int]:
    size: tuple[int, int] | None = None
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _START_OF_FRAME and at + 9 <= len(content):
            size = int.from_bytes(content[at + 5 : at + 7], "big"), int.from_bytes(content[at + 7 : at + 9], "big")
        if marker == _START_OF_SCAN:
            # Inside a scan FF is always stuffed, so an end-of-image marker there is a real one.
            if size is None or content.find(b"\xff\xd9", at) < 0:
                break
            scans = content.count(b"\xff\xda", at)
            if scans > MAX_SCANS:
                raise FrameError(f"JPEG has {scans} scans, at most {MAX_SCANS} are decoded; publish baseline JPEG")
            return size
        at += 2 + max(length, 2)
    raise FrameError(f"JPEG of {len(content)} bytes is truncated or corrupt; check the driver or the transport")
