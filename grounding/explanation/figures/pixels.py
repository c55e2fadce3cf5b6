"""Pixel operations for one panel: image, heat, hatching, patch grid, peak and box, on RGB uint8 (height, width, 3).

The panel is the whole image at another size. "Panel pixels" are its coordinates: (x, y), origin top-left.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageDraw, ImageFont

from grounding.core.errors import OptionError
from grounding.core.geometry import Geometry
from grounding.core.registry import did_you_mean

# Red is high, white is zero, blue is low.
DIVERGING = "RdBu_r"

# Share of its own colour that the image keeps under the heat: low, so that colour means heat; above zero, so that
# objects remain recognisable.
SATURATION = 0.25
# Exponent of the opacity where the heat is zero: 0.6 becomes 0.28.
FADING = 2.5
# Grey mixed into the unseen area and into maps without evidence, and the share of the image that remains.
FADE_TO, FADED = 208, 0.45

# An image thinner than 1 : STRETCH is widened, one flatter than LINE_STRETCH : 1 (a line of text) is heightened; the
# figure notes it.
STRETCH, LINE_STRETCH = 8.0, 40.0

Rgb = UInt8[np.ndarray, "height width 3"]
Segment = tuple[tuple[float, float], tuple[float, float]]
Segments = Sequence[Segment]


@lru_cache(maxsize=16)
def colour_table(name: str) -> UInt8[np.ndarray, "256 3"]:
    """256 RGB colours of a matplotlib colour map, the colour of the highest value last. Raises OptionError."""
    if name not in colormaps:
        known = sorted(colormaps)
        hint = did_you_mean(name, known) or "; for example magma, viridis, gray, jet"
        raise OptionError(f"unknown colour map {name!r}{hint}")
    table = colormaps[name](np.linspace(0, 1, 256), bytes=True)[:, :3].copy()
    table.flags.writeable = False
    return table


def fit(
    width: int, height: int, longest: int, thinnest: float = STRETCH, flattest: float = LINE_STRETCH
) -> tuple[int, int]:
    """(height, width) of a panel whose longer side is `longest`.

    An image thinner than 1 : `thinnest` is widened, one flatter than `flattest` : 1 is heightened.
    """
    ratio = min(max(width / height, 1 / thinnest), flattest)
    return (max(1, round(longest / ratio)), longest) if ratio >= 1 else (longest, max(1, round(longest * ratio)))


def distorted(width: int, height: int) -> str:
    """Note on the changed aspect ratio of an image of this size; empty where it is unchanged."""
    ratio = width / height
    if 1 / STRETCH <= ratio <= LINE_STRETCH:
        return ""
    return f"drawn {'wider' if ratio < 1 else 'higher'} than it is"


def resized(image: Image.Image, size: tuple[int, int]) -> Rgb:
    """The image as RGB at `size` (height, width)."""
    height, width = size
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if rgb.size != (width, height):
        # Large photographs are first reduced by an integer factor, to at least twice the wanted size: several times as
        # fast. Small images are enlarged with the sharper filter: thin strokes of letters stay legible.
        larger = width >= rgb.width and height >= rgb.height
        resampling = Image.Resampling.LANCZOS if larger else Image.Resampling.BICUBIC
        rgb = rgb.resize((width, height), resampling, reducing_gap=2.0)
    return np.asarray(rgb, dtype=np.uint8)


def grey(rgb: Rgb) -> UInt8[np.ndarray, "height width"]:
    """Luminance."""
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)


def ground(rgb: Rgb, background: str) -> Rgb:
    """The background of the heat: the image with muted colours, or its Canny edges, dark on white."""
    luminance = grey(rgb)
    if background == "edges":
        smooth = cv2.GaussianBlur(luminance, (0, 0), max(0.8, max(rgb.shape[:2]) / 500))
        edges = cv2.dilate(cv2.Canny(smooth, 40, 110), np.ones((2, 2), np.uint8))
        return np.repeat((255 - (edges > 0) * np.uint8(215))[..., None], 3, axis=2)
    return cv2.addWeighted(rgb, SATURATION, np.repeat(luminance[..., None], 3, axis=2), 1 - SATURATION, 0)


def faded(rgb: Rgb) -> Rgb:
    """The image in pale grey: without colour, nothing in it can be mistaken for heat."""
    pale = np.round(grey(rgb) * FADED + FADE_TO * (1 - FADED)).astype(np.uint8)
    return np.repeat(pale[..., None], 3, axis=2)


def colours(unit: Float[np.ndarray, "height width"], name: str) -> Rgb:
    """Values in [0, 1] in the colours of a colour map; NaN has the colour of 0 (`hatch` marks it)."""
    return colour_table(name)[np.round(np.nan_to_num(unit) * 255).astype(np.uint8)]


def blend(below: Rgb, above: Rgb, opacity: float, weight: Float[np.ndarray, "height width"] | None = None) -> Rgb:
    """`above` over `below`, at `opacity` where `weight` is 1, fading to opacity ** FADING where it is 0.

    The image stays visible where there is little heat. Colour increases with heat; opacity 1 is opaque everywhere.
    """
    if weight is None:
        return cv2.addWeighted(above, opacity, below, 1 - opacity, 0)
    steps = np.linspace(1, 0, 256, dtype=np.float32)
    alphas = np.float32(opacity) ** (1 + (FADING - 1) * steps)
    alpha = alphas[np.round(np.nan_to_num(weight) * 255).astype(np.uint8)][..., None]
    return np.round(below + alpha * (above.astype(np.float32) - below)).astype(np.uint8)


def hatch(rgb: Rgb, pale: Rgb, unseen: Bool[np.ndarray, "height width"]) -> Rgb:
    """Replace the unseen area by `pale` (see `faded`: never dark) with darker diagonal lines."""
    if not unseen.any():
        return rgb
    height, width = unseen.shape
    step = max(5, round(_measure(rgb) / 32))
    phase = (np.arange(height)[:, None] + np.arange(width)[None, :]) % step
    line = (phase < max(1, round(step / 6)))[..., None]
    return np.where(unseen[..., None], np.where(line, pale // 5 * 3, pale), rgb)


def grid_lines(geometry: Geometry) -> list[Segment]:
    """Outlines of the seen patches: lines from (x, y) to (x, y), as fractions of the image, origin top-left."""
    seen = geometry.seen_cells
    cells = [geometry.cell_box(int(row), int(column)) for row, column in zip(*np.nonzero(seen), strict=True)]
    boxes = np.array([cell for cell in cells if cell is not None]) / ((geometry.width, geometry.height) * 2)
    xs, ys = (sorted({float(x) for x in boxes[:, [axis, axis + 2]].flat}) for axis in (0, 1))
    return [((x, ys[0]), (x, ys[-1])) for x in xs] + [((xs[0], y), (xs[-1], y)) for y in ys]


def draw_grid(rgb: Rgb, geometry: Geometry) -> Rgb:
    """Draw the outlines of the seen patches in half-transparent lines, light on dark and dark on light."""
    height, width = rgb.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    for line in grid_lines(geometry):
        start, end = ((min(round(x * width), width - 1), min(round(y * height), height - 1)) for x, y in line)
        cv2.line(mask, start, end, 255, _stroke(rgb, 500))
    # Brightness is averaged over a neighbourhood: a line that changed colour at every speck would look torn.
    around = cv2.blur(grey(rgb), (max(3, width // 20), max(3, height // 20)))
    contrast = np.where(around < 128, np.uint8(255), np.uint8(0))[..., None]
    mixed = blend(rgb, np.repeat(contrast, 3, axis=2), 0.4)
    return np.where(mask[..., None] > 0, mixed, rgb)


def draw_box(rgb: Rgb, box: tuple[int, int, int, int]) -> Rgb:
    """Draw a half-open box (x0, y0, x1, y1), panel pixels, white in black: outside a small box, inside a large one."""
    height, width = rgb.shape[:2]
    drawn, line = rgb.copy(), _stroke(rgb, 220)
    # Inside, so that a box at the image's edge keeps its whole line; outside, where the line would cover a small box.
    x0, x1 = _framed(box[0], box[2], width, line)
    y0, y1 = _framed(box[1], box[3], height, line)
    for colour, outer, inner in ((0, 0, 3 * line), (255, line, 2 * line)):
        frame = np.zeros((height, width), bool)
        frame[y0 + outer : y1 - outer, x0 + outer : x1 - outer] = True
        frame[y0 + inner : y1 - inner, x0 + inner : x1 - inner] = False
        drawn[frame] = colour
    return drawn


def _framed(start: int, end: int, size: int, line: int) -> tuple[int, int]:
    """Outer ends of a frame 3 `line` thick around [start, end), within `size` pixels."""
    out = 0 if end - start >= 16 * line else 3 * line
    return max(0, start - out), min(size, max(end, start + 1) + out)


def draw_peak(rgb: Rgb, point: tuple[float, float]) -> Rgb:
    """Draw a ring around a point (x, y), panel pixels; white in black, to be visible on every background."""
    drawn = np.ascontiguousarray(rgb)
    line, radius = _stroke(rgb, 350), max(2.5, _measure(rgb) / 50)
    # cv2 counts from pixel centres; four fractional bits place the ring between pixels.
    centre = (round((point[0] - 0.5) * 16), round((point[1] - 0.5) * 16))
    for colour, thickness in (((0, 0, 0), 3 * line), ((255, 255, 255), line)):
        cv2.circle(drawn, centre, round(radius * 16), colour, thickness, cv2.LINE_AA, shift=4)
    return drawn


def _stroke(rgb: Rgb, parts: int) -> int:
    return max(1, round(_measure(rgb) / parts))


def _measure(rgb: Rgb) -> float:
    """Side of a square of the panel's area, the reference length of lines and marks."""
    return float(np.sqrt(rgb.shape[0] * rgb.shape[1]))


def draw_note(rgb: Rgb, text: str) -> Rgb:
    """Draw a line of text on a white plate at the centre, as large as fits; too small a panel stays unchanged."""
    height, width = rgb.shape[:2]
    for size in range(max(8, round(_measure(rgb) / 15)), 7, -1):
        font = _font(size)
        left, top, right, bottom = font.getbbox(text)
        if right - left + size <= width and bottom - top + size <= height:
            break
    else:
        return rgb
    image = Image.fromarray(rgb)
    pen = ImageDraw.Draw(image)
    x, y = (width - (right - left)) / 2, (height - (bottom - top)) / 2
    pen.rectangle((x - size / 2, y - size / 2, x + right - left + size / 2, y + bottom - top + size / 2), fill="white")
    pen.text((x - left, y - top), text, font=font, fill=(60, 60, 60))
    return np.asarray(image)


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
