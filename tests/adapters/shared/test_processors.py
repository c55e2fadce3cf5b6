"""The geometry of real image processors, against a planted square and against the ramps."""

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from adapters.shared.processors import ProcessorError, _centre_offset, geometry_of, known_steps
from grounding.adapter.geometry_probe import measure_geometry
from grounding.core.errors import ProbeError
from grounding.core.geometry import GeometryError

PROCESSORS = {
    # shortest edge, centre crop
    "clip": lambda: transformers.CLIPImageProcessor(),
    "clip_tall": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 100}, crop_size={"height": 81, "width": 64}
    ),
    "crop_larger_than_image": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 75}, crop_size={"height": 96, "width": 112}
    ),
    "convnext": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 224}),
    "convnext_crop_pct": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 96}, crop_pct=0.77),
    "llava": lambda: transformers.LlavaImageProcessor(),
    # squash, centre crop
    "align": lambda: transformers.EfficientNetImageProcessor(
        do_center_crop=True, rescale_factor=1 / 127.5, rescale_offset=True
    ),
    # squash
    "efficientnet": lambda: transformers.EfficientNetImageProcessor(),
    "vit": lambda: transformers.ViTImageProcessor(),
    "vit_wide": lambda: transformers.ViTImageProcessor(size={"height": 96, "width": 160}),
    "deit": lambda: transformers.DeiTImageProcessor(),
    "siglip": lambda: transformers.SiglipImageProcessor(),
    "blip": lambda: transformers.BlipImageProcessor(),
    "flava": lambda: transformers.FlavaImageProcessor(),
    "convnext_384": lambda: transformers.ConvNextImageProcessor(),
    "vilt": lambda: transformers.ViltImageProcessor(size={"shortest_edge": 192}),
    # longest edge, pad
    "corner_pad": lambda: transformers.ViTImageProcessor(
        size={"max_height": 192, "max_width": 160}, do_pad=True, pad_size={"height": 192, "width": 160}
    ),
    "both_edges_pad": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 120, "longest_edge": 250},
        do_center_crop=False,
        do_pad=True,
        pad_size={"height": 250, "width": 250},
    ),
    "donut": lambda: transformers.DonutImageProcessor(size={"height": 224, "width": 160}),
    "llava_square": lambda: transformers.LlavaImageProcessor(do_pad=True),
    "no_resize": lambda: transformers.CLIPImageProcessor(do_resize=False),
}


@pytest.fixture(scope="module", params=sorted(PROCESSORS))
def processor(request):
    return PROCESSORS[request.param]()


def pixels(processor, image):
    """(C, H, W) model input of a PIL image."""
    return processor(images=image, return_tensors="np")["pixel_values"][0]


def sizes(seed, count, low, high):
    return np.random.default_rng(seed).integers(low, high, (count, 2)).tolist()


def test_a_planted_square_comes_back_to_its_place(processor):
    """Through the real processor, a mean over patches, and back: within half a patch, in original pixels."""
    rng = np.random.default_rng(1)
    for width, height in sizes(0, 20, 40, 420):
        black = pixels(processor, Image.new("RGB", (width, height)))
        rows, columns = black.shape[1] // 8, black.shape[2] // 8
        geometry = geometry_of(processor, width, height, black.shape[1:]).with_grid(rows, columns, (8.0, 8.0))
        # The square lies well inside of what is seen, a patch large in the image, never smaller than a pixel.
        x0, y0, x1, y1 = geometry.seen
        patch = np.maximum(8 / np.array(geometry.scale), 1)
        free = np.array([x1 - x0, y1 - y0]) - patch
        if (free < 0).any():
            continue  # a strip that is thinner than a patch has no inside
        corner = np.array([x0, y0]) + free * rng.random(2)
        left, top = np.floor(corner).astype(int)
        right, bottom = np.ceil(corner + patch).astype(int)
        planted = np.zeros((height, width, 3), dtype=np.uint8)
        planted[top:bottom, left:right] = 255
        bright = (pixels(processor, Image.fromarray(planted)) - black).mean(axis=0)
        cells = bright[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).mean(axis=(1, 3))
        full = geometry.to_original(cells)
        ys, xs = np.nonzero(full >= np.nanmax(full) - 1e-6)
        off = np.stack([xs + 0.5 - (left + right) / 2, ys + 0.5 - (top + bottom) / 2], axis=1)
        # Beyond the last cell centre the peak is a plateau: its nearest point counts.
        off = off[np.abs(off).sum(axis=1).argmin()]
        assert (np.abs(off) <= patch / 2 + 1).all(), (width, height, off, patch)


def test_settings_agree_with_the_ramps(processor):
    assert known_steps(processor) is not None
    for width, height in [(1600, 400), (307, 575), (24, 600), *sizes(2, 4, 60, 700)]:
        try:
            expected = geometry_of(processor, width, height)
        except GeometryError:
            # ViLT rounds the short side of a strip down to 0; the processor itself has no answer either.
            with pytest.raises(ValueError, match=r"width=0|height=0"):
                pixels(processor, Image.new("RGB", (width, height)))
            continue
        measured = measure_geometry(lambda image: pixels(processor, image), width, height)
        assert (measured.input_width, measured.input_height) == (expected.input_width, expected.input_height)
        assert off_by(measured, expected) < 0.1, (width, height)


def off_by(measured, expected):
    """How far the corners of what is seen land apart in the model input, in pixels of the coarser frame."""
    apart = measured.boxes_to_input(expected.seen) - expected.boxes_to_input(expected.seen)
    return (np.abs(apart) / np.maximum(np.array(expected.scale * 2), 1)).max()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(PROCESSORS)), st.integers(1, 90), st.integers(1, 90), st.booleans())
def test_the_input_size_is_foreseen_to_the_pixel(name, width, height, tenfold):
    width *= 10 if tenfold else 1
    processor = PROCESSORS[name]()
    try:
        shape = pixels(processor, Image.new("RGB", (width, height))).shape[1:]
    except ValueError:
        return  # the processor cannot do it either
    geometry = geometry_of(processor, width, height, input_size=shape, grid=(2, 3))
    assert (geometry.input_height, geometry.input_width) == shape
    assert (geometry.rows, geometry.columns) == (2, 3)


def test_the_two_back_ends_pad_an_odd_rest_on_different_sides():
    # ceil for PIL, floor for torchvision; a crop is floor for both.
    assert [_centre_offset(5, 8, backend) for backend in ("pil", "torchvision")] == [-2, -1]
    assert [_centre_offset(8, 5, backend) for backend in ("pil", "torchvision")] == [1, 1]


def test_a_processor_within_a_processor():
    class Whole:
        image_processor = transformers.CLIPImageProcessor()

    assert geometry_of(Whole(), 1600, 400).seen == (600, 0, 1000, 400)


def test_unknown_steps_are_measured():
    class Shifted(transformers.CLIPImageProcessor):
        def center_crop(self, image, size, **kwargs):
            return image[:, : size.height, : size.width]

    assert known_steps(Shifted()) is None
    assert geometry_of(Shifted(), 300, 200).seen == pytest.approx((0, 0, 200, 200), abs=0.2)


def test_a_batch_is_padded_at_the_right_and_the_bottom():
    processor = transformers.ViltImageProcessor(size={"shortest_edge": 64}, size_divisor=16)
    batch = [Image.new("RGB", (100, 64), "white"), Image.new("RGB", (64, 100), "white")]
    shape = processor(images=batch, return_tensors="np")["pixel_values"].shape[2:]
    geometry = geometry_of(processor, 100, 64, input_size=shape, grid=(6, 6))
    assert geometry.seen == (0, 0, 100, 64)
    assert geometry.seen_cells.sum(axis=0).tolist() == [4] * 6
    with pytest.raises(ProcessorError, match=r"got 96 x 96 pixels, but its processor makes 224 x 224"):
        geometry_of(transformers.ViTImageProcessor(), 100, 64, input_size=shape)


def test_settings_that_make_no_sense():
    with pytest.raises(ProcessorError, match="turns this 300 x 100 image by 90 degrees"):
        geometry_of(transformers.DonutImageProcessor(do_align_long_axis=True), 300, 100)
    with pytest.raises(ProcessorError, match="pad_size 32 x 32 is smaller"):
        geometry_of(transformers.ViTImageProcessor(do_pad=True, pad_size={"height": 32, "width": 32}), 300, 100)
    with pytest.raises(ProcessorError, match=r"longest_edge.* has no form"):
        geometry_of(transformers.CLIPImageProcessor(size={"longest_edge": 32}), 300, 100)
    with pytest.raises(ProbeError, match="neither an image processor nor a callable"):
        geometry_of("clip", 300, 100)


# ---------------------------------------------------------------- any callable


def tensor(image):
    return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)


def small(image):
    return image.resize((96, 80), Image.Resampling.BICUBIC)


def random_crop():
    rng = np.random.default_rng(0)

    def preprocess(image):
        x, y = (int(n) for n in rng.integers(0, 30, 2))
        return tensor(image.crop((x, y, x + 100, y + 100)))

    return preprocess


def standardised(image):
    values = tensor(image)
    return (values - values.mean()) / (values.std() + 1e-6)


@pytest.mark.parametrize("size", [(264, 165), (262, 140), (2000, 90), (90, 61)])
@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_ramps_measure_a_plain_resize(size, resample):
    """2 : 1 reductions are among the sizes: there roundings to 8 bits add up instead of averaging out."""
    measured = measure_geometry(lambda image: tensor(image.resize((131, 90), resample)), *size)
    tolerance = 0.3 if resample == Image.Resampling.NEAREST else 0.05
    scale = np.minimum(np.array([131, 90, 131, 90]) / (size * 2), 1)
    assert (np.abs(np.array(measured.seen) - (0, 0, *size)) * scale).max() < tolerance


@pytest.mark.parametrize(
    ("preprocess", "seen"),
    [
        (lambda image: tensor(small(image))[::-1] * [[[0.1]], [[-2]], [[3]]] + 7, (0, 0, 300, 200)),
        (lambda image: {"pixel_values": tensor(ImageOps.fit(image, (64, 64)))[None]}, (50, 0, 250, 200)),
        (lambda image: np.asarray(small(image).convert("L"))[None], (0, 0, 300, 200)),
        (lambda image: tensor(ImageOps.pad(image, (96, 96), color="red")), (0, 0, 300, 200)),
        (lambda image: tensor(image.crop((33, 20, 133, 110)).resize((77, 55))), (33, 20, 133, 110)),
    ],
    ids=["normalised", "fit", "grey", "padded", "cropped_first"],
)
def test_ramps_measure_any_callable(preprocess, seen):
    assert measure_geometry(preprocess, 300, 200).seen == pytest.approx(seen, abs=0.3)
    if preprocess(Image.new("RGB", (300, 200)).convert("L")) is not None:
        assert measure_geometry(preprocess, 300, 200, mode="L").seen == pytest.approx(seen, abs=0.3)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (lambda image: tensor(ImageOps.mirror(small(image))), "mirrored along x"),
        (lambda image: tensor(ImageOps.flip(small(image))), "mirrored along y"),
        (lambda image: tensor(small(image).transpose(Image.Transpose.ROTATE_90)), "more than a ramp along x: turned"),
        (lambda image: tensor(small(image.rotate(3))), "does not fill one rectangle"),
        (random_crop(), "answers to one image differ: the preprocessing is random"),
        (lambda image: np.tile(tensor(image.resize((48, 48))), (1, 2, 2)), "does not follow a line of the image"),
        (lambda image: tensor(ImageOps.expand(small(image).crop((20, 20, 60, 60)), 9)), "cropped and then padded"),
        (standardised, "normalised per image"),
        (lambda image: tensor(small(image)) ** 2.2, "brightness is bent|does not follow a line"),
        (lambda image: np.asarray(small(image)), r"shape \(80, 96, 3\) have their channels last"),
        (lambda image: tensor(small(image))[None, None], r"shape \(1, 1, 3, 80, 96\) are not one image"),
        (lambda image: {"input_ids": [1]}, "returns .*input_ids.*, no pixel_values"),
        (lambda image: tensor(image.resize((1, 1))), "too few to fit a line"),
    ],
)
def test_what_is_no_affine_map_is_refused(preprocess, message):
    with pytest.raises(ProbeError, match=message):
        measure_geometry(preprocess, 300, 200)


def test_a_strip_is_too_small_to_measure():
    with pytest.raises(ProbeError, match="each side needs 8 pixels"):
        measure_geometry(tensor, 1, 4000)
