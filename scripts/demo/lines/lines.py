"""Render text lines with the exact box of every character.

Characters are drawn one by one along the pen position, without kerning, so that the box of each one is known.
"""

from __future__ import annotations

import io
import random
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from scripts.demo.lines.text import LONGEST, sample_text

Colour = tuple[int, int, int]

INPUT_HEIGHT, INPUT_WIDTH = 32, 256  # size of the model's input
ASCENT, DESCENT = 0.93, 0.25  # the line box above and below the baseline, in font sizes, the same for all faces
MARGIN = 4.0  # left and right of the text, in pixels of the model's input

FACES = Path(mpl.get_data_path()) / "fonts/ttf"
FIRST_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
)
LATER_FACES = (
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmtt10",
)
UNSEEN_FACES = ("DejaVuSerif-Italic", "STIXGeneralBol", "cmss10")  # never in training


@dataclass(frozen=True)
class Style:
    """How a line is drawn. Lengths are in pixels of the model's input, independent of the size of the image."""

    face: str = "DejaVuSans"
    size: float = 18.0  # font size
    top: float = 0.5  # position of the line box: 0 at the top of the image, 1 at the bottom
    left: float = 0.1  # position of the text: 0 at the left margin, 1 at the right
    height: int = 48  # of the image, in its own pixels
    stretch: float = 1.0  # the image is 8 * stretch times as wide as high
    ink: Colour = (0, 0, 0)
    paper: Colour = (255, 255, 255)
    noise: float = 0.0  # standard deviation, grey levels
    blur: float = 0.0  # radius
    jpeg: int = 0  # quality, 0: none

    @property
    def polarity(self) -> str:
        """Polarity of the ink: "dark" on lighter paper, or "light" on darker."""
        return "dark" if luminance(self.ink) < luminance(self.paper) else "light"


@dataclass(frozen=True)
class Line:
    """A rendered line; `boxes` (n, 4) are (x0, y0, x1, y1) in the image's pixels, continuous, origin top left."""

    text: str
    style: Style
    image: Image.Image
    boxes: np.ndarray

    def label(self) -> dict[str, object]:
        """The entry of the line in labels.jsonl, without the file name."""
        style = asdict(self.style)
        return {
            "text": self.text,
            "chars": [[round(value, 2) for value in box] for box in self.boxes.tolist()],
            "face": style.pop("face"),
            "unseen_face": self.style.face in UNSEEN_FACES,
            "polarity": self.style.polarity,
            **{name: round(value, 3) if isinstance(value, float) else value for name, value in style.items()},
        }


def luminance(colour: Colour) -> float:
    """Grey level of a colour, 0 to 255, by the weights of ITU-R BT.601."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """`size` in quarters of a pixel. The basic layout advances character by character."""
    return ImageFont.truetype(FACES / f"{face}.ttf", size / 4, layout_engine=ImageFont.Layout.BASIC)


@cache
def _advance(face: str, size: int, character: str) -> float:
    return _font(face, size).getlength(character)


def _fit(text: str, style: Style, room: float) -> tuple[str, int]:
    """The text and the font size (quarters of the image's pixels) at which it fits into `room`.

    The size shrinks down to 14 pixels of the input; then the text is truncated.
    """
    scale = style.height / INPUT_HEIGHT * 4
    size, least = round(style.size * scale), round(14 * scale)
    width = sum(_advance(style.face, size, character) for character in text)
    if width > room:
        size = max(least, int(size * room / width))
    while len(text) > 3 and sum(_advance(style.face, size, character) for character in text) > room:
        text = text[:-1].rstrip()
    return text, size


def render(text: str, style: Style, rng: np.random.Generator) -> Line:
    """Draw a line; `rng` generates its noise."""
    height, width = style.height, round(style.height * INPUT_WIDTH / INPUT_HEIGHT * style.stretch)
    margin = MARGIN * width / INPUT_WIDTH
    text, size = _fit(text, style, width - 2 * margin)
    advances = [_advance(style.face, size, character) for character in text]
    pens = np.cumsum([margin + style.left * max(0.0, width - 2 * margin - sum(advances)), *advances])
    above, below = ASCENT * size / 4, DESCENT * size / 4
    baseline = round(style.top * max(0.0, height - above - below) + above)
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for character, pen in zip(text, pens, strict=False):
        if character != " ":
            draw.text((pen, baseline), character, fill=255, font=_font(style.face, size), anchor="ls")
    boxes = np.array([(a, baseline - above, b, baseline + below) for a, b in pairwise(pens)])
    boxes = boxes.clip(0, (width, height, width, height))
    drawn = replace(style, size=size / (4 * height / INPUT_HEIGHT))
    return Line(text, drawn, _print(mask, style, rng), boxes)


def _print(mask: Image.Image, style: Style, rng: np.random.Generator) -> Image.Image:
    """Compose ink and paper, then apply blur, noise and JPEG."""
    image = Image.composite(Image.new("RGB", mask.size, style.ink), Image.new("RGB", mask.size, style.paper), mask)
    if style.blur:
        image = image.filter(ImageFilter.GaussianBlur(style.blur * style.height / INPUT_HEIGHT))
    if style.noise:
        noise = rng.standard_normal((*mask.size[::-1], 3), dtype=np.float32) * style.noise
        image = Image.fromarray((np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8))
    if style.jpeg:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=style.jpeg)
        image = Image.open(buffer).convert("RGB")
    return image


def _ramp(difficulty: float, begin: float, end: float) -> float:
    """0 before `begin`, 1 after `end`."""
    return min(1.0, max(0.0, (difficulty - begin) / (end - begin)))


def _colour(rng: random.Random) -> Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _grey(rng: random.Random) -> Colour:
    level = rng.randrange(256)
    return level, level, level


def _colours(rng: random.Random, light: bool, coloured: bool) -> dict[str, Colour]:
    """Ink and paper that differ by at least 100 grey levels."""
    while True:
        if coloured:
            one, two = _colour(rng), _colour(rng)
        else:
            one, two = _grey(rng), _grey(rng)
        if abs(luminance(one) - luminance(two)) >= 100:
            dark, bright = sorted((one, two), key=luminance)
            return {"ink": bright, "paper": dark} if light else {"ink": dark, "paper": bright}


def sample_style(rng: random.Random, difficulty: float = 1.0, faces: tuple[str, ...] = ()) -> Style:
    """Draw a style of the training mixture at a difficulty from 0 to 1.

    Rising difficulty adds, in this order: vertical position, light ink, colour, more faces, stretch, sizes, noise and
    blur. `faces` overrides the faces.
    """

    def part(begin: float, end: float, share: float) -> bool:
        return rng.random() < share * _ramp(difficulty, begin, end)

    later = part(0.4, 0.6, len(LATER_FACES) / len(FIRST_FACES + LATER_FACES))
    face = rng.choice(faces or (LATER_FACES if later else FIRST_FACES))
    spread = 0.3 + 0.7 * _ramp(difficulty, 0.0, 0.2)
    # Often near the top or bottom, so that small text lies in one half of the image only.
    top = 0.5 + spread * (rng.choice((rng.random(), 0.3 * rng.random(), 1 - 0.3 * rng.random())) - 0.5)
    wide = _ramp(difficulty, 0.6, 0.7)
    stretch = rng.uniform(1 - 0.2 * wide, 1 + 0.3 * wide)
    sizes = _ramp(difficulty, 0.7, 0.8)
    size = rng.uniform(17 - 3 * sizes, 20 + 4 * sizes)
    return Style(
        face=face,
        # A wide image is squeezed: small letters would become narrower than a patch.
        size=max(size, 14 * stretch),
        top=top,
        left=rng.random(),
        height=rng.randint(32, 72),
        stretch=stretch,
        **_colours(rng, part(0.2, 0.3, 1 / 3), part(0.3, 0.4, 0.6)),
        noise=rng.uniform(3, 20) if part(0.8, 1.0, 0.5) else 0.0,
        blur=rng.uniform(0.2, 0.6) if part(0.8, 1.0, 0.4) else 0.0,
        jpeg=rng.randint(40, 95) if part(0.8, 1.0, 0.4) else 0,
    )


def sample_line(seed: str, difficulty: float = 1.0, faces: tuple[str, ...] = (), longest: int = LONGEST) -> Line:
    """Draw a line of the training mixture; the same seed gives the same line."""
    rng = random.Random(seed)
    text = sample_text(rng, longest)
    return render(text, sample_style(rng, difficulty, faces), np.random.default_rng(rng.getrandbits(64)))


def resize_to_input(image: Image.Image) -> np.ndarray:
    """(32, 256, 3) uint8: the image, resized as the image processor does."""
    return np.asarray(image.resize((INPUT_WIDTH, INPUT_HEIGHT), Image.Resampling.BILINEAR))
