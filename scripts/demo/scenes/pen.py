"""Draw shapes of one sprite in design units on a transparent layer.

Design frame: origin top-left, x right, y down, the design height is 100 units for every sprite.
"""

from __future__ import annotations

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

INK: Colour = (38, 32, 40)


def shade(colour: Colour, factor: float) -> Colour:
    """A darker (factor < 1) or lighter (factor > 1, towards white) `colour`."""
    if factor <= 1:
        return tuple(int(channel * factor) for channel in colour)
    return tuple(int(channel + (255 - channel) * (factor - 1)) for channel in colour)


class Pen:
    """Draws outlined shapes on a layer of `width` x 100 design units with `scale` pixels per unit."""

    def __init__(self, width: float, scale: float, flip: bool = False) -> None:
        self.width, self.scale, self.flip = width, scale, flip
        # One unit of margin on each side, so that an outline is never cut off.
        self.layer = Image.new("RGBA", (round((width + 2) * scale) + 1, round(102 * scale) + 1), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.layer)
        self.stroke = max(1, round(0.9 * scale))

    def at(self, x: float, y: float) -> Point:
        """Convert design units to layer pixels."""
        if self.flip:
            x = self.width - x
        return (x + 1) * self.scale, (y + 1) * self.scale

    def polygon(self, points: list[Point], fill: Colour, outline: Colour | None = INK) -> None:
        """A filled polygon through `points`."""
        corners = [self.at(*point) for point in points]
        self.draw.polygon(corners, fill=fill)
        if outline is not None:
            self.draw.line([*corners, corners[0]], fill=outline, width=self.stroke, joint="curve")

    def _frame(self, x: float, y: float, rx: float, ry: float) -> list[float]:
        (x0, y0), (x1, y1) = self.at(x - rx, y - ry), self.at(x + rx, y + ry)
        return [min(x0, x1), y0, max(x0, x1), y1]

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour | None, outline: Colour | None = INK
    ) -> None:
        """An ellipse with centre (x, y) and half axes rx, ry; without `fill` only its outline."""
        width = self.stroke if outline is not None else 0
        self.draw.ellipse(self._frame(x, y, rx, ry), fill=fill, outline=outline, width=width)

    def ring(self, x: float, y: float, radius: float, thickness: float, colour: Colour) -> None:
        """A circle of `thickness` design units, inside `radius`."""
        width = max(1, round(thickness * self.scale))
        self.draw.ellipse(self._frame(x, y, radius, radius), outline=colour, width=width)

    def chord(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        start: float,
        end: float,
        fill: Colour,
        outline: Colour | None = INK,
    ) -> None:
        """Segment of an ellipse between two angles in degrees, clockwise from the right, cut by a straight line."""
        if self.flip:
            start, end = 180 - end, 180 - start
        width = self.stroke if outline is not None else 0
        self.draw.chord(self._frame(x, y, rx, ry), start, end, fill=fill, outline=outline, width=width)

    def line(self, points: list[Point], colour: Colour, thickness: float) -> None:
        """A line of `thickness` design units."""
        width = max(1, round(thickness * self.scale))
        self.draw.line([self.at(*point) for point in points], fill=colour, width=width, joint="curve")

    def limb(self, points: list[Point], fill: Colour, thickness: float) -> None:
        """A thick line with round ends and an outline: an arm, a leg, a tail."""
        rim = 2 * self.stroke / self.scale
        for colour, size in ((INK, thickness + rim), (fill, thickness)):
            self.line(points, colour, size)
            for x, y in (points[0], points[-1]):
                self.ellipse(x, y, size / 2, size / 2, colour, outline=None)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float = 0.0) -> None:
        """A rectangle with rounded corners."""
        (left, top), (right, bottom) = self.at(x0, y0), self.at(x1, y1)
        frame = [min(left, right), top, max(left, right), bottom]
        self.draw.rounded_rectangle(frame, radius=radius * self.scale, fill=fill, outline=INK, width=self.stroke)
