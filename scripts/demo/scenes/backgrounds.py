"""Draw the background of each place: sky, ground and distant scenery, without any object of the vocabulary.

Frame: canvas pixels (x, y), origin top-left; lengths are fractions of `unit`, the short side in canvas pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from scripts.demo.scenes.pen import Colour, shade

# (draw, width or size of the canvas, unit, horizon, rng): all lengths in canvas pixels.
Far = Callable[[ImageDraw.ImageDraw, int, float, float, random.Random], None]
Near = Callable[[ImageDraw.ImageDraw, tuple[int, int], float, float, random.Random], None]

SKIES: dict[str, tuple[tuple[Colour, Colour], ...]] = {
    "street": (((150, 190, 222), (222, 232, 236)), ((176, 184, 196), (226, 222, 214))),
    "grass": (((120, 184, 236), (220, 238, 246)), ((238, 190, 150), (250, 232, 206))),
    "beach": (((96, 176, 236), (212, 240, 250)), ((244, 178, 138), (252, 226, 190))),
    "snow": (((178, 198, 220), (232, 238, 244)), ((150, 180, 214), (240, 232, 236))),
}
GROUNDS: dict[str, tuple[Colour, ...]] = {
    "street": ((128, 128, 132), (142, 138, 134)),
    "grass": ((128, 186, 96), (146, 192, 100), (112, 172, 98)),
    "beach": ((236, 214, 164), (228, 204, 158)),
    "snow": ((234, 240, 246), (226, 234, 244)),
}
WALLS: tuple[Colour, ...] = ((198, 164, 140), (178, 170, 160), (206, 190, 160), (160, 152, 156), (186, 146, 128))


def draw_background(place: str, size: tuple[int, int], unit: float, horizon: float, rng: random.Random) -> Image.Image:
    """Draw an image of `size` (width, height) in canvas pixels; `horizon` is the y of the horizon in canvas pixels."""
    width, height = size
    image = _gradient(size, *rng.choice(SKIES[place]), bottom=horizon)
    draw = ImageDraw.Draw(image)
    ground = tuple(channel + rng.randint(-8, 8) for channel in rng.choice(GROUNDS[place]))
    if place != "street":
        _clouds(draw, width, unit, horizon, rng)
    FAR[place](draw, width, unit, horizon, rng)
    lower = _gradient((width, max(1, height - int(horizon))), shade(ground, 1.18), shade(ground, 0.88))
    image.paste(lower, (0, int(horizon)))
    NEAR[place](ImageDraw.Draw(image), (width, height), unit, horizon, rng)
    return image


def _gradient(size: tuple[int, int], top: Colour, low: Colour, bottom: float | None = None) -> Image.Image:
    """A vertical blend from `top` to `low`, which is reached at y = `bottom` (the lower edge by default)."""
    width, height = size
    share = np.clip(np.arange(height) / max(1.0, bottom or height), 0, 1)[:, None]
    column = (np.array(top) * (1 - share) + np.array(low) * share).clip(0, 255).astype(np.uint8)
    return Image.fromarray(column[:, None]).resize((width, height), Image.Resampling.NEAREST)


def _clouds(draw: ImageDraw.ImageDraw, width: int, unit: float, horizon: float, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        x, y, r = rng.uniform(0, width), rng.uniform(0.1, 0.7) * horizon, rng.uniform(0.03, 0.06) * unit
        for dx, scale in ((-1.3, 0.7), (0, 1.0), (1.4, 0.75)):
            frame = [x + (dx - scale * 1.5) * r, y - scale * r, x + (dx + scale * 1.5) * r, y + scale * r * 0.6]
            draw.ellipse(frame, fill=(244, 246, 248))


def _far_street(draw: ImageDraw.ImageDraw, width: int, unit: float, horizon: float, rng: random.Random) -> None:
    """A row of houses with windows up to the horizon line."""
    x = -rng.uniform(0, 0.2) * unit
    while x < width:
        house, top = rng.uniform(0.18, 0.34) * unit, horizon - rng.uniform(0.22, 0.42) * unit
        wall = rng.choice(WALLS)
        draw.rectangle([x, top, x + house, horizon], fill=wall)
        draw.rectangle([x, top, x + house, top + 0.015 * unit], fill=shade(wall, 0.75))
        step = 0.075 * unit
        pane = shade(wall, rng.choice((0.7, 1.5)))
        row = top + 0.045 * unit
        while row + step * 0.7 < horizon:
            column = x + 0.03 * unit
            while column + step * 0.6 < x + house:
                draw.rectangle([column, row, column + step * 0.5, row + step * 0.6], fill=pane)
                column += step
            row += step
        x += house


def _far_hills(colours: tuple[Colour, ...], steep: float) -> Far:
    """Scenery of overlapping hills or peaks; `steep` is the share of peaks."""

    def draw_hills(draw: ImageDraw.ImageDraw, width: int, unit: float, horizon: float, rng: random.Random) -> None:
        for colour in colours:
            for _ in range(max(2, int(2 * width / unit))):
                x, w, h = rng.uniform(0, width), rng.uniform(0.25, 0.5) * unit, rng.uniform(0.07, 0.16) * unit
                if rng.random() < steep:
                    draw.polygon(
                        [(x - w * 0.7, horizon + 1), (x, horizon - 1.4 * h), (x + w * 0.7, horizon + 1)], colour
                    )
                else:
                    draw.ellipse([x - w, horizon - h, x + w, horizon + h], fill=colour)

    return draw_hills


def _far_sea(draw: ImageDraw.ImageDraw, width: int, unit: float, horizon: float, rng: random.Random) -> None:
    sea = rng.choice(((70, 150, 190), (84, 168, 186), (60, 134, 176)))
    top = horizon - rng.uniform(0.10, 0.16) * unit
    draw.rectangle([0, top, width, horizon], fill=sea)
    for _ in range(int(14 * width / unit)):
        x, y, w = rng.uniform(0, width), rng.uniform(top, horizon), rng.uniform(0.02, 0.08) * unit
        draw.line([x, y, x + w, y], fill=shade(sea, 1.45), width=max(1, round(0.006 * unit)))


def _near_street(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], unit: float, horizon: float, rng: random.Random
) -> None:
    """A pavement and a road with dashes."""
    width, _ = size
    kerb = horizon + rng.uniform(0.10, 0.16) * unit
    draw.rectangle([0, horizon, width, kerb], fill=(192, 188, 180))
    draw.rectangle([0, kerb, width, kerb + 0.015 * unit], fill=(150, 146, 142))
    y, x = kerb + rng.uniform(0.16, 0.22) * unit, -rng.uniform(0, 0.2) * unit
    while x < width:
        draw.rectangle([x, y, x + 0.13 * unit, y + 0.018 * unit], fill=(222, 220, 210))
        x += 0.24 * unit


def _near_grass(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], unit: float, horizon: float, rng: random.Random
) -> None:
    width, height = size
    for _ in range(int(60 * width * (height - horizon) / unit**2)):
        x, y, h = rng.uniform(0, width), rng.uniform(horizon, height), rng.uniform(0.012, 0.028) * unit
        tint = (74, 138, 62) if rng.random() < 0.6 else (176, 214, 126)
        for dx in (-0.5, 0.5):
            draw.line([x, y, x + dx * h, y - h], fill=tint, width=max(1, round(0.006 * unit)))


def _near_dots(colours: tuple[Colour, ...], count: int, size_range: tuple[float, float]) -> Near:
    """Ground with scattered flat dots: pebbles on sand, tracks in snow."""

    def draw_dots(
        draw: ImageDraw.ImageDraw, size: tuple[int, int], unit: float, horizon: float, rng: random.Random
    ) -> None:
        width, height = size
        for _ in range(int(count * width * (height - horizon) / unit**2)):
            x, y, r = rng.uniform(0, width), rng.uniform(horizon, height), rng.uniform(*size_range) * unit
            draw.ellipse([x - r, y - r * 0.5, x + r, y + r * 0.5], fill=rng.choice(colours))

    return draw_dots


FAR = {
    "street": _far_street,
    "grass": _far_hills(((136, 178, 132), (112, 164, 104)), 0.0),
    "beach": _far_sea,
    "snow": _far_hills(((168, 184, 206), (214, 224, 236)), 0.8),
}
NEAR = {
    "street": _near_street,
    "grass": _near_grass,
    "beach": _near_dots(((214, 188, 136), (246, 230, 190), (196, 172, 128)), 60, (0.004, 0.010)),
    "snow": _near_dots(((206, 218, 234), (250, 252, 254)), 50, (0.006, 0.03)),
}


def add_noise(image: Image.Image, strength: float, cells: int, seed: int) -> Image.Image:
    """Add low-frequency noise: `cells` cells along the short side, standard deviation `strength` grey levels.

    A cell is a fraction of the image, so the noise looks the same at every resolution.
    """
    width, height = image.size
    short = min(width, height)
    grid = (max(2, round(cells * width / short)), max(2, round(cells * height / short)))
    noise = np.random.default_rng(seed).normal(128.0, strength, (grid[1], grid[0])).clip(0, 255).astype(np.uint8)
    blotches = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
    return ImageChops.add(image, Image.merge("RGB", (blotches,) * 3), offset=-128)
