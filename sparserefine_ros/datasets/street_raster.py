"""Projection and rasterisation: convex polygons to an id buffer, far to near, by the pixel-centre rule.

A pixel belongs to a polygon exactly if its centre (column + 0.5, row + 0.5) lies inside. That rule knows nothing of
resolution, so the labels of one scene agree at all sizes.

Shape shorthand: P polygons, V vertices, E (edge, row) pairs, S spans.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NEAR = 0.4  # metres


class Polygons(NamedTuple):
    """Screen polygons in pixel coordinates: vertices of all, and how many each has."""

    xy: np.ndarray  # [V, 2]
    sides: np.ndarray  # [P]


def starts(count: np.ndarray) -> np.ndarray:
    """Index of each polygon's first vertex."""
    out = np.zeros(len(count), np.int64)
    np.cumsum(count[:-1], out=out[1:])
    return out


def gather(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Indices of the vertices of chosen polygons, one after the other."""
    total = int(count.sum())
    local = np.arange(total) - np.repeat(starts(count), count)
    return np.repeat(first, count) + local


def clip_near(points: np.ndarray, near: float = NEAR) -> np.ndarray:
    """One camera-space polygon [n, 3] cut at z = near (Sutherland and Hodgman, 1974)."""
    out: list[np.ndarray] = []
    for i in range(len(points)):
        a, b = points[i], points[(i + 1) % len(points)]
        if a[2] >= near:
            out.append(a)
        if (a[2] >= near) != (b[2] >= near):
            out.append(a + (b - a) * ((near - a[2]) / (b[2] - a[2])))
    return np.array(out).reshape(-1, 3)


class Spans(NamedTuple):
    """Runs of pixels: polygon, row, columns [begin, end); sorted by polygon."""

    polygon: np.ndarray
    row: np.ndarray
    begin: np.ndarray
    end: np.ndarray


def polygon_spans(polygons: Polygons, height: int, width: int) -> Spans:
    """All spans of convex polygons, by scan conversion of all edges at once."""
    xy, count = polygons
    first = starts(count)
    owner = np.repeat(np.arange(len(count)), count)
    following = np.arange(len(xy)) + 1
    following[first + count - 1] = first
    x0, y0 = xy[:, 0], xy[:, 1]
    x1, y1 = x0[following], y0[following]
    area = np.add.reduceat(x0 * y1 - x1 * y0, first) if len(count) else np.zeros(0)
    low = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
    high = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
    rows = high - low
    top = np.minimum.reduceat(np.where(rows > 0, low, height), first)
    bottom = np.maximum.reduceat(np.where(rows > 0, high, 0), first)
    tall = np.maximum(bottom - top, 0)
    offset = starts(tall)
    total = int(tall.sum())
    edge = np.repeat(np.arange(len(xy)), rows)
    row = np.repeat(low - starts(rows), rows) + np.arange(len(edge))
    slope = (x1 - x0) / np.where(y1 == y0, 1.0, y1 - y0)
    x = x0[edge] + (row + 0.5 - y0[edge]) * slope[edge]
    column = np.ceil(np.clip(x, -1.0, width + 1.0) - 0.5).astype(np.int64)
    span = (offset - top)[owner[edge]] + row
    is_right = (y1 > y0)[edge] == (area > 0)[owner[edge]]
    begin, end = np.zeros(total, np.int64), np.zeros(total, np.int64)
    end[span[is_right]] = column[is_right]
    begin[span[~is_right]] = column[~is_right]
    np.clip(begin, 0, width, out=begin)
    np.clip(end, 0, width, out=end)
    polygon = np.repeat(np.arange(len(count)), tall)
    span_row = np.arange(total) - np.repeat(offset - top, tall)
    keep = end > begin
    return Spans(polygon[keep], span_row[keep], begin[keep], end[keep])


def fill_small(ids: np.ndarray, spans: Spans, low: int, high: int, value: np.ndarray) -> None:
    """Paints spans low..high-1 in order: of a pixel's owners the last wins (numpy's rule for repeated indices)."""
    if high <= low:
        return
    width = ids.shape[1]
    flat = ids.reshape(-1)
    while low < high:
        length = spans.end[low:high] - spans.begin[low:high]
        total = np.cumsum(length)
        stop = low + max(1, int(np.searchsorted(total, 400_000)))  # stay inside the cache
        length, base = length[: stop - low], (spans.row[low:stop] * width + spans.begin[low:stop])
        index = np.arange(int(length.sum())) + np.repeat(base - starts(length), length)
        flat[index] = np.repeat(value[spans.polygon[low:stop]], length)
        low = stop


def fill_large(ids: np.ndarray, spans: Spans, low: int, high: int, value: int) -> None:
    """Paints the spans of one large polygon through a mask of its bounding box."""
    begin, end, rows = spans.begin[low:high], spans.end[low:high], spans.row[low:high]
    x0, x1, y0, y1 = int(begin.min()), int(end.max()), int(rows[0]), int(rows[-1]) + 1
    limit = np.zeros((2, y1 - y0), np.int32)
    limit[0, rows - y0], limit[1, rows - y0] = begin, end  # a sliver may miss a row
    columns = np.arange(x0, x1, dtype=np.int32)
    inside = (columns >= limit[0][:, None]) & (columns < limit[1][:, None])
    np.copyto(ids[y0:y1, x0:x1], ids.dtype.type(value), where=inside)
