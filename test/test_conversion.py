"""Image messages to RGB and back, against hand-made values and float references."""

from __future__ import annotations

import struct
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserefine_ros.errors import FrameError
from sparserefine_ros.node.conversion import colourise, overlay, to_rgb
from sparserefine_ros.node.encodings import ENCODINGS


def raw(data: bytes, height: int, width: int, encoding: str, step: int | None = None, big: int = 0) -> SimpleNamespace:
    if step is None:
        step = width * ENCODINGS[encoding].bytes_per_pixel if encoding in ENCODINGS else width
    return SimpleNamespace(
        header="h", height=height, width=width, encoding=encoding, step=step, is_bigendian=big, data=data
    )


def compressed(data: bytes, format_text: str = "jpeg") -> SimpleNamespace:
    return SimpleNamespace(header="h", format=format_text, data=data)


def pad(image: np.ndarray, step: int, last: bool = True) -> bytes:
    """The rows of `image`, each followed by 0xEE up to `step` bytes."""
    rows = [row.tobytes() for row in image]
    padded = [row + b"\xee" * (step - len(row)) for row in rows]
    return b"".join(padded if last else [*padded[:-1], rows[-1]])


RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
ALPHA = np.full((6, 8, 1), 77, np.uint8)
GRAY = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
GRAY3 = np.repeat(GRAY[..., None], 3, axis=2)
DIRECT = [
    ("rgb8", RGB, RGB),
    ("bgr8", RGB[..., ::-1], RGB),
    ("8UC3", RGB[..., ::-1], RGB),
    ("rgba8", np.concatenate([RGB, ALPHA], 2), RGB),
    ("bgra8", np.concatenate([RGB[..., ::-1], ALPHA], 2), RGB),
    ("8UC4", np.concatenate([RGB[..., ::-1], ALPHA], 2), RGB),
    ("mono8", GRAY, GRAY3),
    ("8UC1", GRAY, GRAY3),
]


@pytest.mark.parametrize("padding", [0, 1, 5, 64])
@pytest.mark.parametrize("last_row_padded", [True, False])
@pytest.mark.parametrize(("encoding", "stored", "expected"), DIRECT, ids=[row[0] for row in DIRECT])
def test_eight_bit_encodings_are_exact(encoding, stored, expected, padding, last_row_padded):
    stored = np.ascontiguousarray(stored)
    step = stored[0].nbytes + padding
    result = to_rgb(raw(pad(stored, step, last_row_padded), 6, 8, encoding, step))
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == np.uint8 and result.flags.c_contiguous


def test_rgb8_shares_the_messages_memory():
    data = bytearray(RGB.tobytes())
    result = to_rgb(raw(data, 6, 8, "rgb8"))
    data[0] ^= 0xFF
    assert result[0, 0, 0] == data[0]


@pytest.mark.parametrize("big", [0, 1])
@pytest.mark.parametrize("padding", [0, 2, 7])
@pytest.mark.parametrize("encoding", ["mono16", "rgb16", "bgr16", "rgba16", "bgra16"])
def test_sixteen_bits_are_scaled_and_rounded_in_both_byte_orders(encoding, padding, big):
    channels = ENCODINGS[encoding].channels
    values = RNG.integers(0, 65536, (5, 4, channels), dtype=np.uint16)
    values[0, 0] = 0
    values[0, 1] = 65535
    values[0, 2] = 128  # 128 * 255 / 65535 = 0.498: down
    values[0, 3] = 129  # 0.502: up
    stored = values.astype(">u2" if big else "<u2")
    step = stored[0].nbytes + padding
    result = to_rgb(raw(pad(stored, step), 5, 4, encoding, step, big))
    eight = np.rint(values.astype(float) * 255 / 65535)
    order = {"mono16": [0, 0, 0], "rgb16": [0, 1, 2], "rgba16": [0, 1, 2]}.get(encoding, [2, 1, 0])
    np.testing.assert_array_equal(result, eight[..., order])


def yuv_reference(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """ITU-R BT.601, limited range: what cameras' UYVY means."""
    luma = 1.164383 * (y.astype(float) - 16)
    blue, red = u.astype(float) - 128, v.astype(float) - 128
    rgb = np.stack([luma + 1.596027 * red, luma - 0.391762 * blue - 0.812968 * red, luma + 2.017232 * blue], -1)
    return np.clip(rgb, 0, 255)


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize(("encoding", "order"), [("yuv422", "uyvy"), ("yuv422_yuy2", "yuyv"), ("yuyv", "yuyv")])
def test_yuv422_in_both_orders(encoding, order, padding):
    luma = RNG.integers(16, 236, (4, 8), dtype=np.uint8)
    blue, red = RNG.integers(16, 240, (2, 4, 4), dtype=np.uint8)
    stored = np.empty((4, 16), np.uint8)
    first, second = (1, 0) if order == "uyvy" else (0, 1)
    stored[:, first::2] = luma
    stored[:, second::4], stored[:, second + 2 :: 4] = blue, red
    step = 16 + padding
    result = to_rgb(raw(pad(stored, step), 4, 8, encoding, step))
    expected = yuv_reference(luma, blue.repeat(2, 1), red.repeat(2, 1))
    assert np.abs(result - expected).max() <= 1.01


def bayer_reference(mosaic: np.ndarray, pattern: str) -> np.ndarray:
    """Bilinear demosaicing: the mean of the nearest samples of each colour, in float64."""
    image = mosaic.astype(float)
    kernel = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], float)
    out = np.zeros((*image.shape, 3))
    for channel, letter in enumerate("rgb"):
        weight = np.zeros(image.shape)
        for index, site in enumerate(pattern):
            if site == letter:
                weight[index // 2 :: 2, index % 2 :: 2] = 1
        plus = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]], float)  # green neighbours are the four adjacent ones
        taps = plus if letter == "g" else kernel
        total = cv2.filter2D(image * weight, -1, taps, borderType=cv2.BORDER_CONSTANT)
        norm = cv2.filter2D(weight, -1, taps, borderType=cv2.BORDER_CONSTANT)
        out[..., channel] = np.where(weight > 0, image, total / np.maximum(norm, 1))
    return out


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns(pattern, padding):
    mosaic = RNG.integers(0, 256, (12, 14), dtype=np.uint8)
    step = 14 + padding
    result = to_rgb(raw(pad(mosaic, step), 12, 14, f"bayer_{pattern}8", step))
    inner = (slice(1, -1), slice(1, -1))  # OpenCV replicates at the border
    assert np.abs(result[inner] - bayer_reference(mosaic, pattern)[inner]).max() <= 1.01


@pytest.mark.parametrize("big", [0, 1])
def test_sixteen_bit_bayer_of_a_flat_colour(big):
    mosaic = np.empty((8, 8), ">u2" if big else "<u2")
    mosaic[0::2, 0::2], mosaic[1::2, 1::2] = 257 * 200, 257 * 50  # red, blue
    mosaic[0::2, 1::2] = mosaic[1::2, 0::2] = 257 * 120  # green
    result = to_rgb(raw(mosaic.tobytes(), 8, 8, "bayer_rggb16", big=big))
    np.testing.assert_array_equal(result[2:-2, 2:-2].reshape(-1, 3), [[200, 120, 50]] * 16)


FORMATS = ["png", "PNG", "rgb8; png compressed bgr8", "bgr8; png compressed bgr8", ".png", ""]


@pytest.mark.parametrize("format_text", FORMATS)
def test_png_is_exact_whatever_the_format_says(format_text):
    data = cv2.imencode(".png", RGB[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(to_rgb(compressed(data, format_text)), RGB)


@pytest.mark.parametrize("format_text", ["jpeg", "jpg", "rgb8; jpeg compressed bgr8", "bgr8; jpeg"])
def test_jpeg_keeps_channel_order(format_text):
    flat = np.empty((16, 24, 3), np.uint8)
    flat[:] = (220, 120, 30)
    data = cv2.imencode(".jpg", flat[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    result = to_rgb(compressed(data, format_text))
    assert result.shape == flat.shape
    assert np.abs(result.astype(int) - flat).max() <= 4


def test_grey_jpeg_becomes_three_channels():
    data = cv2.imencode(".jpg", np.full((16, 16), 90, np.uint8))[1].tobytes()
    assert np.abs(to_rgb(compressed(data)).astype(int) - 90).max() <= 1


def test_sixteen_bit_png_is_rounded():
    data = cv2.imencode(".png", np.array([[0, 128, 129, 65535]], np.uint16))[1].tobytes()
    np.testing.assert_array_equal(to_rgb(compressed(data, "mono16; png compressed"))[0, :, 0], [0, 0, 1, 255])


@pytest.mark.parametrize(("bits", "dtype", "unit"), [(8, np.uint8, 1), (16, np.uint16, 257)])
def test_compressed_bayer_is_demosaiced(bits, dtype, unit):
    mosaic = np.empty((8, 8), dtype)
    mosaic[0::2, 0::2], mosaic[1::2, 1::2] = 200, 50
    mosaic[0::2, 1::2] = mosaic[1::2, 0::2] = 120
    data = cv2.imencode(".png", mosaic * dtype(unit))[1].tobytes()
    result = to_rgb(compressed(data, f"bayer_rggb{bits}; png compressed "))
    np.testing.assert_array_equal(result[2:-2, 2:-2].reshape(-1, 3), [[200, 120, 50]] * 16)


def test_exif_orientation_is_ignored():
    """A mask must lie on the pixels as sent; a decoder that turns the picture would exchange its sides."""
    jpeg = cv2.imencode(".jpg", np.zeros((16, 32, 3), np.uint8))[1].tobytes()
    tiff = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + b"\0\0\0\0"
    exif = b"Exif\0\0" + tiff
    turned = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape[:2] == (32, 16)
    assert to_rgb(compressed(turned)).shape[:2] == (16, 32)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"\0\0\0\0IEND\xaeB`\x82"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + end


def jpeg_header(width: int, height: int) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00"
    scan = b"\x01\x01\x00\x00\x3f\x00"
    return (
        b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame
        + b"\xff\xda" + struct.pack(">H", len(scan) + 2) + scan + b"\xff\xd9"
    )  # fmt: skip


JPEG = cv2.imencode(".jpg", cv2.resize(RGB, (64, 48)))[1].tobytes()
PNG = cv2.imencode(".png", RGB)[1].tobytes()
BAD = {
    "unknown encoding": (raw(b"\0" * 12, 2, 2, "rgb9"), ["'rgb9'", "bgr8"]),
    "empty encoding": (raw(b"\0" * 12, 2, 2, ""), ["''", "rgb8"]),
    "depth image": (raw(b"\0" * 16, 2, 2, "32FC1"), ["'32FC1'", "rgb8"]),
    "step too small": (raw(RGB.tobytes(), 6, 8, "rgb8", step=23), ["step 23", "24"]),
    "step zero": (raw(RGB.tobytes(), 6, 8, "rgb8", step=0), ["step 0", "24"]),
    "step too large": (raw(RGB.tobytes(), 6, 8, "rgb8", step=32), ["144 bytes", "192"]),
    "truncated": (raw(RGB.tobytes()[:-1], 6, 8, "rgb8"), ["143 bytes", "144"]),
    "no data": (raw(b"", 6, 8, "rgb8"), ["0 bytes", "144"]),
    "too much data": (raw(RGB.tobytes() + b"\0", 6, 8, "rgb8"), ["145 bytes", "144"]),
    "zero height": (raw(b"", 0, 8, "rgb8"), ["8 x 0", "at least 1"]),
    "zero width": (raw(b"", 6, 0, "rgb8"), ["0 x 6", "at least 1"]),
    "absurd size": (raw(b"\0" * 99, 2**32 - 1, 2**31, "mono8"), ["2147483648 x 4294967295", "67108864"]),
    "odd width yuv": (raw(b"\0" * 30, 3, 5, "yuv422"), ["width is 5", "even"]),
    "compressed empty": (compressed(b""), ["(none)", "jpeg"]),
    "compressed garbage": (compressed(b"hello world"), ["68 65 6c 6c", "JPEG"]),
    "video": (compressed(b"\0\0\0\1\x67", "h264"), ["'h264'", "png"]),
    "truncated jpeg": (compressed(JPEG[: len(JPEG) // 2]), ["JPEG", "truncated"]),
    "jpeg start only": (compressed(JPEG[:3]), ["JPEG of 3 bytes", "truncated"]),
    "truncated png": (compressed(PNG[: len(PNG) // 2], "png"), ["PNG", "truncated"]),
    "png without pixels": (compressed(png_header(64, 64), "png"), ["cannot be decoded", "'png'"]),
    "png bomb": (compressed(png_header(60000, 60000), "png"), ["60000 x 60000", "67108864"]),
    "png chunk of 4 GB": (compressed(PNG[:33] + b"\xff" * 4 + PNG[37:], "png"), ["PNG", "truncated or corrupt"]),
    "animated png": (compressed(PNG[:33] + b"\0\0\0\0acTL\0\0\0\0" + PNG[33:], "png"), ["PNG is animated"]),
    "jpeg bomb": (compressed(jpeg_header(60000, 60000)), ["60000 x 60000", "67108864"]),
    "jpeg of many passes": (compressed(JPEG[:-2] + b"\xff\xda" * 32 + b"\xff\xd9"), ["33 scans", "at most 32"]),
    "encoding for the log": (raw(b"", 1, 1, "rgb8\n" + "x" * 10**6), ["'rgb8\\nxxx"]),
    "png of nothing": (compressed(png_header(0, 5), "png"), ["0 x 5", "at least 1"]),
}


@pytest.mark.parametrize(("message", "words"), BAD.values(), ids=BAD)
def test_bad_frames_name_the_value_and_the_remedy(message, words):
    with pytest.raises(FrameError) as error:
        to_rgb(message)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 1000  # it goes into the log


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=200),
    height=st.integers(0, 12) | st.integers(0, 2**32 - 1),
    width=st.integers(0, 12) | st.integers(0, 2**32 - 1),
    step=st.integers(0, 60) | st.integers(0, 2**32 - 1),
    encoding=st.sampled_from([*ENCODINGS, "nv12", ""]) | st.text(max_size=6),
    big=st.integers(0, 255),
)
def test_any_raw_message_gives_an_image_or_a_frame_error(data, height, width, step, encoding, big):
    try:
        result = to_rgb(raw(data, height, width, encoding, step, big))
    except FrameError:
        return
    assert result.shape == (height, width, 3) and result.dtype == np.uint8


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(ENCODINGS)), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(0, 1))
def test_any_consistent_raw_message_gives_an_image(encoding, height, width, padding, big):
    kind = ENCODINGS[encoding]
    width += width % 2 if kind.even_width else 0
    step = width * kind.bytes_per_pixel + padding
    result = to_rgb(raw(bytes(step * height), height, width, encoding, step, big))
    assert result.shape == (height, width, 3) and result.dtype == np.uint8


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([JPEG, PNG]),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
    st.floats(0.0, 1.0),
    st.sampled_from(["jpeg", "png", "bayer_rggb8; jpeg compressed ", "x"]),
)
def test_any_damaged_compressed_image_gives_an_image_or_a_frame_error(source, damage, keep, format_text):
    data = bytearray(source)
    for place, value in damage:
        data[int(place * len(data))] = value
    try:
        result = to_rgb(compressed(bytes(data[: round(keep * len(data))]), format_text))
    except FrameError:
        return
    assert result.ndim == 3 and result.shape[2] == 3 and result.dtype == np.uint8


def test_colourise_looks_every_id_up():
    lut = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(colourise(mask, lut), lut[mask])


@pytest.mark.parametrize("opacity", [0.0, 0.3, 0.5, 1.0])
def test_overlay_blends(opacity):
    colour = RNG.integers(0, 256, RGB.shape, dtype=np.uint8)
    expected = RGB.astype(float) * (1 - opacity) + colour.astype(float) * opacity
    assert np.abs(overlay(RGB, colour, opacity) - expected).max() <= 0.5 + 1e-4
