"""Decode image files to upright RGB images; broken files raise errors of one line.

Plug-ins of Pillow are called one by one instead of through `Image.open`: the size is checked against our own limit
before anything is decoded, no process-wide flag of Pillow is touched, and no format is tried that runs other programs.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageFile

from grounding.core.errors import ImageError
from grounding.core.printable import one_line

# About 100 megapixels: 300 MB of RGB.
MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
WHITE = (255, 255, 255, 255)
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's plug-ins raise on broken files; a warning where the caller turned warnings into errors.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error, Warning)


def decode(data: bytes, name: str, max_pixels: int) -> tuple[Image.Image, tuple[str, ...]]:
    """Return (upright RGB image, warnings) of an encoded image; `name` is for messages.

    Raises ImageError: `failed_decode` for incomplete images, `failed_input` for more than `max_pixels`.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes)", "failed_decode")
    image = _identify(data, name)
    check_size(image, name, max_pixels)
    try:
        image.load()
    except (*BROKEN, MemoryError) as error:
        raise ImageError(f"{name}: {_reason(error)}", "failed_decode") from None
    opened, warnings = upright_rgb(image, name)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        warnings = (*warnings, "this process has switched Pillow's check for truncated files off")
    return opened, (*_frames(image), *warnings)


def check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    """Raise ImageError for more than `max_pixels` pixels, from the header alone."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image is {width} x {height} pixels", "failed_decode")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} = {width * height} pixels, more than the limit max_pixels = {max_pixels}",
            "failed_input",
        )


def upright_rgb(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Return (RGB image rotated by its EXIF orientation, warnings) of a loaded image of any mode."""
    try:
        opened, warnings = _to_rgb(image, name)
        orientation, trouble = _orientation(image)
        if orientation in UPRIGHT:
            opened = opened.transpose(UPRIGHT[orientation])
    except (OSError, ValueError, MemoryError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: {_reason(error)}", "failed_decode") from None
    return opened, warnings + trouble


# ---------------------------------------------------------------- header


def _identify(data: bytes, name: str) -> Image.Image:
    """Return the opened image, not yet decoded."""
    Image.init()
    trouble = ""
    for kind in FORMATS:
        # A build of Pillow may lack some, and answers for them with a sentence instead of True.
        factory, accept = Image.OPEN.get(kind, (None, None))
        if factory is None or (accept is not None and accept(data[:16]) is not True):
            continue
        try:
            return factory(io.BytesIO(data), "")
        except BROKEN as error:
            # Without a signature of its own (TGA) any file would be a broken one.
            if accept is not None and not trouble:
                trouble = f"a broken or truncated {kind} file ({one_line(error)})"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        trouble = "HEIC images cannot be read; convert it to JPEG or PNG"
    trouble = trouble or f"not an image that can be read ({', '.join(FORMATS)})"
    raise ImageError(f"{name}: {trouble}", "failed_decode")


def _frames(image: Image.Image) -> tuple[str, ...]:
    # In an MPO the further frames are previews of the same photograph.
    if image.format == "MPO":
        return ()
    try:
        count = getattr(image, "n_frames", 1)
        return (f"{image.format} with {count} frames: only the first is used",) if count > 1 else ()
    except BROKEN:
        return (f"{image.format} with several frames, some of them broken: only the first is used",)


def _reason(error: BaseException) -> str:
    text = one_line(error)
    if "truncated" in text or isinstance(error, EOFError):
        return f"the image is truncated ({text})"
    return f"the image cannot be decoded ({text})"


def _orientation(image: Image.Image) -> tuple[int, tuple[str, ...]]:
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
        return (value if isinstance(value, int) else 1), ()
    except BROKEN:
        return 1, ("its EXIF data is broken: the image is taken as it is stored",)


# ---------------------------------------------------------------- modes


def _to_rgb(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """RGB on purpose: 16 bits are scaled, not clipped, and whatever is transparent lies over white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _grey(np.asarray(image).astype(np.float64) / 65535), ()
    if image.mode in ("I", "F"):
        return _unknown_range(image, name)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), rgba).convert("RGB"), ()
    return (image.copy() if image.mode == "RGB" else image.convert("RGB")), ()


def _unknown_range(image: Image.Image, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError(f"{name}: the image has values that are not finite", "failed_decode")
    low, high = float(values.min()), float(values.max())
    warning = f"mode {image.mode} says nothing of its range: {low:g} to {high:g} was stretched to black to white"
    return _grey((values - low) / (high - low or 1.0)), (warning,)


def _grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(levels * 255).astype(np.uint8)).convert("RGB")
