"""Every kind of picture file, whole and broken."""

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from grounding.core.images import ImageError, open_image
from tests.support.images import encode, noise, open_bytes, refused


def first_pixel(image):
    return image.pil.getpixel((0, 0))


# ---------------------------------------------------------------- whole pictures


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA"])
def test_formats(kind, tmp_path):
    data = encode(noise(), kind)
    path = tmp_path / "picture.of-no-known-type"
    path.write_bytes(data)
    image = open_image(path)
    assert (image.pil.mode, image.pil.size) == ("RGB", (80, 60))
    assert (image.width, image.height, image.path) == (80, 60, str(path))
    assert image.sha256 == hashlib.sha256(data).hexdigest()
    assert image.warnings == ()
    with Image.open(path) as expected:
        assert np.array_equal(np.asarray(image.pil), np.asarray(expected.convert("RGB")))


# What the EXIF standard says: the side of the upright picture that the first stored row and column show.
FIRST_ROW_AND_COLUMN = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def as_stored(upright, orientation):
    row, column = FIRST_ROW_AND_COLUMN.get(orientation, ("top", "left"))
    stored = upright if row in ("top", "bottom") else upright.swapaxes(0, 1)
    return stored[:: -1 if row in ("bottom", "right") else 1, :: -1 if column in ("bottom", "right") else 1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_all_orientations_give_the_upright_image(kind, orientation):
    upright = np.zeros((48, 72, 3), dtype=np.uint8)
    upright[:16, :16] = 255
    upright[:16, 48:] = 120
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_bytes(encode(Image.fromarray(np.ascontiguousarray(as_stored(upright, orientation))), kind, exif=exif))
    assert (image.width, image.height) == (72, 48)
    assert np.abs(np.asarray(image.pil).astype(int) - upright).mean() < 3


@pytest.mark.parametrize("field", ["010e 000c", "a005 0001", "014a 0001"])
def test_a_broken_exif_field_leaves_the_orientation(field):
    """`ImageOps.exif_transpose` writes all fields again: it raises AttributeError, or the image is not rotated."""
    tag, kind = map(bytes.fromhex, field.split())
    fields = sorted([tag + kind + b"\0\0\0\1" + b"\0\0\0\x26", b"\x01\x12\0\3\0\0\0\1\0\6\0\0"])
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + b"".join(fields) + bytes(4) + b"\xff" * 8
    assert open_bytes(encode(noise(), "JPEG", exif=exif)).pil.size == (60, 80)


def test_a_pil_image_is_made_upright_too():
    image = Image.new("RGB", (20, 10))
    image.getexif()[0x0112] = 6
    assert open_image(image).pil.size == (10, 20)
    assert image.size == (20, 10), "the caller's picture stays as it is"


def grey16(mode="I;16"):
    return Image.frombytes(mode, (3, 1), b"\x00\x00\x00\x80\xff\xff" if mode == "I;16" else b"\x00\x00\x80\x00\xff\xff")


@pytest.mark.parametrize(
    "data",
    [
        encode(grey16()),
        encode(grey16(), "TIFF"),
        encode(grey16("I;16B"), "TIFF"),
        b"P5 3 1 65535\n\x00\x00\x80\x00\xff\xff",
    ],
    ids=["png", "tiff", "tiff_big_endian", "pgm"],
)
def test_16_bits_are_scaled_not_clipped(data):
    image = open_bytes(data)
    assert np.asarray(image.pil)[0, :, 0].tolist() == [0, 128, 255]
    assert image.warnings == ()


def test_an_unknown_range_is_stretched_with_a_warning():
    for array in (np.array([[-1, 0.0, 1]], np.float32), np.array([[-70000, 0, 70000]], np.int32)):
        image = open_bytes(encode(Image.fromarray(array), "TIFF"))
        assert np.asarray(image.pil)[0, :, 0].tolist() == [0, 128, 255]
        assert "says nothing of its range" in image.warnings[0]
    assert first_pixel(open_image(Image.new("F", (2, 2), 7.0))) == (0, 0, 0)
    with refused("failed_decode", "not finite"):
        open_image(Image.fromarray(np.array([[np.nan, 1]], np.float32)))


def palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 255, 200, 0, 0])
    return image


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(palette()), (200, 0, 0)),
        (encode(palette(), transparency=1), (255, 255, 255)),
        (encode(palette(), transparency=b"\x00\x80"), (227, 127, 127)),
        (encode(Image.new("RGBA", (3, 3), (255, 0, 0, 0))), (255, 255, 255)),
        (encode(Image.new("RGBA", (3, 3), (255, 0, 0, 128))), (255, 127, 127)),
        (encode(Image.new("LA", (3, 3), (0, 128))), (127, 127, 127)),
        (encode(Image.new("RGB", (3, 3), (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
        (encode(Image.new("L", (3, 3), 7), transparency=7), (255, 255, 255)),
        (encode(Image.new("L", (3, 3), 7)), (7, 7, 7)),
        (encode(Image.new("1", (3, 3), 1)), (255, 255, 255)),
        (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        # Pillow writes CMYK JPEGs as Adobe does, inverted.
        (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (254, 0, 0)),
    ],
    ids=["P", "P+key", "P+alpha", "RGBA", "RGBA-half", "LA", "RGB+key", "L+key", "L", "1", "CMYK", "CMYK-JPEG"],
)
def test_modes(data, expected):
    assert np.abs(np.subtract(first_pixel(open_bytes(data)), expected)).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames(kind):
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "green", "blue")]
    image = open_bytes(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(np.subtract(first_pixel(image), (255, 0, 0))).max() <= 1
    assert image.warnings == (f"{kind} with 3 frames: only the first is used",)


def test_an_animation_whose_end_is_missing():
    data = encode(noise(5, 5), "GIF", save_all=True, append_images=[noise(6, 6).resize((5, 5)), noise(5, 5).rotate(90)])
    assert "some of them broken" in open_bytes(data[:-60]).warnings[0]


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_points_and_strips(size):
    assert open_bytes(encode(Image.new("RGB", size))).pil.size == size


def test_arrays():
    array = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    image = open_image(array[:, ::-1])
    assert np.array_equal(np.asarray(image.pil), array[:, ::-1])
    assert image.path is None
    assert image.sha256 == open_image(Image.fromarray(np.ascontiguousarray(array[:, ::-1]))).sha256
    assert image.sha256 != open_image(array).sha256
    assert first_pixel(open_image(array[..., 0])) == (0, 0, 0)
    assert first_pixel(open_image(np.zeros((2, 2, 4), np.uint8))) == (255, 255, 255)
    for wrong in (array / 255, array[None], array[:0], np.zeros((4, 5, 2), np.uint8)):
        with refused("failed_input", "an array must be uint8"):
            open_image(wrong)


def test_the_image_is_not_the_callers():
    image = Image.new("RGB", (4, 4))
    opened = open_image(image)
    image.putpixel((0, 0), (9, 9, 9))
    assert first_pixel(opened) == (0, 0, 0)


# ---------------------------------------------------------------- broken pictures


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"Dear Sir or Madam, " * 20, "not an image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "HEIC images cannot be read"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 9, "a broken or truncated JPEG file"),
    ],
)
def test_no_image(data, message, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    with refused("failed_decode", f"a.jpg': {message}"):
        open_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_file_cut_at_60_percent(kind, tmp_path):
    data = encode(noise(), kind)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: len(data) * 6 // 10])
    with refused("failed_decode", "cut.jpg': .*truncated"):
        open_image(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_process_that_hides_truncation_is_named(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(noise(), "JPEG")
    assert "check for truncated files off" in open_bytes(data[: len(data) // 2]).warnings[0]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_never_raises_anything_else(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO"]))
    damaged = bytearray(encode(noise(40, 30), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_bytes(bytes(damaged), max_pixels=10**6)
    except ImageError:
        return
    assert image.pil.mode == "RGB"


def test_a_huge_image_is_refused_from_its_header(monkeypatch):
    before = Image.MAX_IMAGE_PIXELS
    data = encode(Image.new("1", (20000, 20000)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # decoding takes seconds
    with refused("failed_input", r"20000 x 20000 = 400000000 pixels, more than the limit max_pixels = 100000000"):
        open_bytes(data)
    monkeypatch.undo()
    with refused("failed_input", "80 x 60 = 4800 pixels"):
        open_bytes(encode(noise()), max_pixels=4799)
    with refused("failed_input", "80 x 60 = 4800 pixels"):
        open_image(noise(), max_pixels=4799)
    open_bytes(encode(noise()), max_pixels=4800)
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillows_own_limit_is_not_ours(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(encode(noise())))
    assert open_bytes(encode(noise())).warnings == ()
