"""Small charts as inline SVG: sharp at any zoom, coloured by the page's style sheet, readable in light and dark.

Everything drawn is a class name of the style sheet and a number; text goes through ElementTree, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree import ElementTree

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 42  # margins around the plot, in user units
NAMES_LEFT = 150


class Chart:
    """Axes with ticks; ``x`` and ``y`` are their ranges, ``size`` the whole picture in user units.

    ``names``: in place of numbers along y, for a chart of rows 0 to 1, 1 to 2, ... from below.
    """

    def __init__(
        self,
        label: str,
        x: tuple[float, float],
        y: tuple[float, float],
        x_label: str,
        y_label: str,
        size: tuple[int, int] = (460, 340),
        names: Sequence[str] = (),
    ) -> None:
        self.left = NAMES_LEFT if names else LEFT
        self.x, self.y = _widen(x), _widen(y)
        self.width, self.height = size
        self._root = ElementTree.Element(
            "svg", {"viewBox": f"0 0 {self.width} {self.height}", "role": "img", "aria-label": label}
        )
        self._axes(x_label, y_label, names)

    def text(self) -> str:
        """The picture, to be put into a page as it is."""
        return ElementTree.tostring(self._root, encoding="unicode")

    def line(self, xs: Sequence[float | None], ys: Sequence[float | None], style: str) -> None:
        """A polyline, broken where a value is None."""
        path, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if x is None or y is None:
                pen = "M"
                continue
            path.append(f"{pen}{self._px(x):.1f} {self._py(y):.1f}")
            pen = "L"
        self._add("path", style, d="".join(path), fill="none")

    def bars(self, boxes: Sequence[tuple[float, float, float, float]], style: str) -> None:
        """Boxes (x from, x to, y from, y to), one shape in all, so that many frames stay a small file."""
        path = [
            f"M{self._px(x0):.1f} {self._py(y0):.1f}V{self._py(y1):.1f}H{self._px(x1):.1f}V{self._py(y0):.1f}Z"
            for x0, x1, y0, y1 in boxes
        ]
        self._add("path", style, d="".join(path))

    def point(self, x: float, y: float, style: str, note: str, radius: float = 4) -> None:
        """A dot; ``note`` shows under the mouse."""
        self._note(self._add("circle", style, cx=self._px(x), cy=self._py(y), r=radius), note)

    def spot(self, x0: float, x1: float, note: str) -> None:
        """An invisible column that shows ``note`` under the mouse."""
        left, right = self._px(x0), self._px(x1)
        top, bottom = self._py(self.y[1]), self._py(self.y[0])
        self._note(self._add("rect", "spot", x=left, y=top, width=right - left, height=bottom - top), note)

    def _axes(self, x_label: str, y_label: str, names: Sequence[str]) -> None:
        left, right, bottom = self.left, self.width - RIGHT, self.height - BOTTOM
        marks = [(i + 0.5, name) for i, name in enumerate(names)] or [(v, number(v)) for v in ticks(*self.y)]
        for value, name in marks:
            y = self._py(value)
            self._add("line", "grid", x1=left, x2=right, y1=y, y2=y)
            self._add("text", "tick end", x=left - 6, y=y + 4).text = name
        for value in ticks(*self.x):
            self._add("text", "tick middle", x=self._px(value), y=bottom + 16).text = number(value)
        self._add("line", "axis", x1=left, x2=right, y1=bottom, y2=bottom)
        self._add("text", "label middle", x=(left + right) / 2, y=self.height - 6).text = x_label
        middle = (TOP + bottom) / 2
        turned = self._add("text", "label middle", x=14, y=middle, transform=f"rotate(-90 14 {middle:.1f})")
        turned.text = y_label

    def _add(self, tag: str, style: str, **attributes: float | str) -> ElementTree.Element:
        written = {k: v if isinstance(v, str) else f"{v:.1f}".removesuffix(".0") for k, v in attributes.items()}
        return ElementTree.SubElement(self._root, tag, {"class": style, **written})

    @staticmethod
    def _note(element: ElementTree.Element, note: str) -> None:
        ElementTree.SubElement(element, "title").text = note

    def _px(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - self.left - RIGHT)

    def _py(self, y: float) -> float:
        bottom = self.height - BOTTOM
        return bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (bottom - TOP)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's number, without the digits that floating point adds."""
    return f"{value:.6g}" if value else "0"


def _widen(span: tuple[float, float]) -> tuple[float, float]:
    """A range that can be divided by, whatever the data."""
    return span if span[1] > span[0] else (span[0], span[0] + 1.0)
