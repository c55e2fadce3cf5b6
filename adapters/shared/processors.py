"""Geometry of an image processor: computed from its settings, or measured if its steps are unknown.

A processor that overrides none of the steps of the transformers back ends follows the common order (resize, centre
crop, pad). The families in `FAMILIES` have steps of their own, rewritten here with the same rounding. The geometry of
all others is measured by `measure_geometry`. Nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grounding.adapter.geometry_probe import measure_geometry
from grounding.core.errors import ModelError, ProbeError
from grounding.core.geometry import Geometry

# A processor that overrides one of these methods has a geometry of its own.
STEPS = (
    "__call__",
    "preprocess",
    "_preprocess_image_like_inputs",
    "_prepare_image_like_inputs",
    "process_image",
    "_preprocess",
    "resize",
    "center_crop",
    "pad",
)
# Maximum error of a measured edge, in pixels of the coarser frame; see `measure_geometry`.
EXACT = 0.1
COMMON_MODULES = frozenset({"transformers.image_processing_backends", "transformers.image_processing_utils"})


class ProcessorError(ModelError):
    """An image processor whose settings or output no geometry describes."""


def geometry_of(
    processor: Any,
    width: int,
    height: int,
    input_size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    mode: str = "RGB",
) -> Geometry:
    """The geometry from an image of width x height pixels to the model input, without running `processor` if possible.

    Parameters
    ----------
    processor: a Hugging Face image processor, a processor that holds one (`.image_processor`), or any callable that
        turns a PIL image into pixel values (see `measure_geometry`).
    input_size: (height, width) of the model's input tensor. If a batch was padded to its largest image (at the right
        and the bottom, as transformers does), the geometry is extended to it.
    grid: (rows, columns) of the patches; else `Geometry.with_grid` sets it later.
    mode: of the PIL images that a callable takes, "RGB" or "L".

    Raises ProcessorError if the settings are invalid, rotate the image, or contradict `input_size`; ProbeError if the
    processor is unknown and its output fits no axis-aligned affine map; GeometryError if padding follows a crop.
    """
    processor = getattr(processor, "image_processor", None) or processor
    steps = known_steps(processor)
    if steps is not None:
        geometry = steps(processor, Geometry(width, height, width, height))
    else:
        geometry = _snapped(measure_geometry(_plain_callable(processor), width, height, mode))
    if input_size is not None:
        geometry = _on_canvas(geometry, input_size, bool(getattr(processor, "do_pad", False)))
    return geometry if grid is None else geometry.with_grid(*grid)


def known_steps(processor: Any) -> Callable[[Any, Geometry], Geometry] | None:
    """The function that applies this processor's steps to a `Geometry`, or None if they are unknown."""
    functions = [getattr(type(processor), step, None) for step in STEPS]
    modules = {getattr(function, "__module__", "") for function in functions} - COMMON_MODULES
    if not modules:
        return _common
    if len(modules) > 1:
        return None
    path = modules.pop().split(".")
    return FAMILIES.get(path[2]) if path[:2] == ["transformers", "models"] else None


# ---------------------------------------------------------------- families


def _common(processor: Any, geometry: Geometry) -> Geometry:
    """Resize, centre crop, pad: CLIP, ViT, DeiT, SigLIP, BLIP, ChineseCLIP, OWL-ViT, ..."""
    geometry = _resize_and_crop(processor, geometry)
    if processor.do_pad and processor.pad_size is not None:
        width, height = _sides(processor.pad_size, "height", "width")[::-1]
        if width < geometry.input_width or height < geometry.input_height:
            raise ProcessorError(
                f"pad_size {width} x {height} is smaller than the image of {geometry.input_width} x "
                f"{geometry.input_height} to pad"
            )
        geometry = geometry.cropped(0, 0, width, height)
    return geometry


def _resize_and_crop(processor: Any, geometry: Geometry) -> Geometry:
    """Resize, centre crop. EfficientNet (ALIGN) and FLAVA ignore `do_pad`."""
    if processor.do_resize:
        geometry = geometry.resized(*_new_size(processor.size, geometry.input_width, geometry.input_height))
    return _center_crop(processor, geometry)


def _convnext(processor: Any, geometry: Geometry) -> Geometry:
    """Resize the shorter side to edge / crop_pct, then centre crop; from edge 384 on resize to a square."""
    if processor.do_resize:
        (edge,) = _sides(processor.size, "shortest_edge")
        if edge < 384:
            short = int(edge / (processor.crop_pct or 224 / 256))
            geometry = geometry.resized(*_shortest(short, geometry.input_width, geometry.input_height))
            geometry = _cut_centre(geometry, edge, edge, processor.backend)
        else:
            geometry = geometry.resized(edge, edge)
    return _center_crop(processor, geometry)


def _donut(processor: Any, geometry: Geometry) -> Geometry:
    """Resize the shorter side to that of `size`, shrink to fit into `size`, then pad around the middle."""
    size_height, size_width = _sides(processor.size, "height", "width")
    landscape, size_landscape = geometry.input_width - geometry.input_height, size_width - size_height
    if processor.do_align_long_axis and landscape * size_landscape < 0:
        raise ProcessorError(
            f"do_align_long_axis turns this {geometry.width} x {geometry.height} image by 90 degrees; "
            "load the processor with do_align_long_axis=False"
        )
    if processor.do_resize:
        short = min(size_height, size_width)
        geometry = geometry.resized(*_shortest(short, geometry.input_width, geometry.input_height))
    if processor.do_thumbnail:
        geometry = geometry.resized(*_thumbnail(geometry.input_width, geometry.input_height, size_width, size_height))
    if processor.do_pad:
        left, top = (size_width - geometry.input_width) // 2, (size_height - geometry.input_height) // 2
        geometry = geometry.cropped(-left, -top, size_width, size_height)
    return _center_crop(processor, geometry)


def _llava(processor: Any, geometry: Geometry) -> Geometry:
    """Pad to a square around the middle if `do_pad`, then resize and centre crop."""
    if processor.do_pad:
        width, height = geometry.input_width, geometry.input_height
        side = max(width, height)
        geometry = geometry.cropped(-((side - width) // 2), -((side - height) // 2), side, side)
    return _resize_and_crop(processor, geometry)


def _vilt(processor: Any, geometry: Geometry) -> Geometry:
    """Resize the shorter side, with a limit on the longer; both rounded down to multiples of `size_divisor`."""
    if not processor.do_resize:
        return geometry
    (shorter,) = _sides(processor.size, "shortest_edge")
    longer = int(1333 / 800 * shorter)
    factor = shorter / min(geometry.width, geometry.height)
    sides = [factor * side for side in _size(geometry)]
    if max(sides) > longer:
        factor = longer / max(sides)
        sides = [factor * side for side in sides]
    width, height = (int(side + 0.5) // processor.size_divisor * processor.size_divisor for side in sides)
    return geometry.resized(width, height)


# The folder of the model in transformers -> its steps.
FAMILIES: dict[str, Callable[[Any, Geometry], Geometry]] = {
    "convnext": _convnext,
    "donut": _donut,
    "efficientnet": _resize_and_crop,
    "flava": _resize_and_crop,
    "llava": _llava,
    "vilt": _vilt,
}


# ---------------------------------------------------------------- single steps


def _center_crop(processor: Any, geometry: Geometry) -> Geometry:
    if not processor.do_center_crop:
        return geometry
    height, width = _sides(processor.crop_size, "height", "width")
    return _cut_centre(geometry, width, height, processor.backend)


def _cut_centre(geometry: Geometry, width: int, height: int, backend: str) -> Geometry:
    x0 = _centre_offset(geometry.input_width, width, backend)
    return geometry.cropped(x0, _centre_offset(geometry.input_height, height, backend), width, height)


def _centre_offset(size: int, crop: int, backend: str) -> int:
    """Start of a centre crop. A crop larger than the image pads; an odd remainder goes to the left with the PIL back
    end and to the right with the torchvision one."""
    if crop > size and backend == "torchvision":
        return -((crop - size) // 2)
    return (size - crop) // 2


def _new_size(size: Any, width: int, height: int) -> tuple[int, int]:
    """(width, height) after the back ends' resize, which tries the forms of `size` in this order."""
    if size.get("shortest_edge") and size.get("longest_edge"):
        return _shortest_with_limit(size["shortest_edge"], size["longest_edge"], width, height)
    if size.get("shortest_edge"):
        return _shortest(size["shortest_edge"], width, height)
    if size.get("max_height") and size.get("max_width"):
        factor = min(size["max_height"] / height, size["max_width"] / width)
        return int(width * factor), int(height * factor)
    if size.get("height") and size.get("width"):
        return size["width"], size["height"]
    raise ProcessorError(f"the processor's size {dict(size)} has no form that its resize accepts")


def _shortest(short: int, width: int, height: int) -> tuple[int, int]:
    """(width, height) with the shorter side `short`, the longer one rounded down."""
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _shortest_with_limit(short: int, limit: int, width: int, height: int) -> tuple[int, int]:
    """(width, height) with the shorter side `short`, or less if the longer side would exceed `limit`."""
    exact: float = short
    if max(width, height) / min(width, height) * short > limit:
        exact = limit * min(width, height) / max(width, height)
        short = round(exact)
    if min(width, height) == short:
        return width, height
    if width < height:
        return short, int(exact * height / width)
    return int(exact * width / height), short


def _thumbnail(width: int, height: int, size_width: int, size_height: int) -> tuple[int, int]:
    """(width, height) of an image shrunk to fit into a size, never enlarged, with Donut's rounding."""
    new_width, new_height = min(width, size_width), min(height, size_height)
    if (new_width, new_height) == (width, height):
        return width, height
    if height > width:
        new_width = int(width * new_height / height)
    elif width > height:
        new_height = int(height * new_width / width)
    return new_width, new_height


def _sides(size: Any, *names: str) -> tuple[int, ...]:
    found = tuple(int((size or {}).get(name) or 0) for name in names)
    if not all(found):
        raise ProcessorError(f"the processor's size {dict(size or {})} has no {' or '.join(names)}")
    return found


def _size(geometry: Geometry) -> tuple[int, int]:
    return geometry.input_width, geometry.input_height


# ---------------------------------------------------------------- the model's tensor


def _on_canvas(geometry: Geometry, input_size: tuple[int, int], pads: bool) -> Geometry:
    """The geometry for a tensor of this (height, width): the same, or padded at the right and the bottom."""
    height, width = input_size
    if (width, height) == _size(geometry):
        return geometry
    if pads and width >= geometry.input_width and height >= geometry.input_height:
        return geometry.cropped(0, 0, width, height)
    raise ProcessorError(
        f"the model got {width} x {height} pixels, but its processor makes {geometry.input_width} x "
        f"{geometry.input_height} of a {geometry.width} x {geometry.height} image"
    )


def _snapped(measured: Geometry) -> Geometry:
    """Snap each axis that covers the whole image within the measurement error to cover exactly the whole image."""
    scale, offset = list(measured.scale), list(measured.offset)
    for axis, (size, pixels) in enumerate(zip((measured.width, measured.height), _size(measured), strict=True)):
        start, end = offset[axis], offset[axis] + size * scale[axis]
        if max(abs(start), abs(end - pixels)) < EXACT * max(1.0, scale[axis]):
            scale[axis], offset[axis] = pixels / size, 0.0
    return replace(measured, scale=(scale[0], scale[1]), offset=(offset[0], offset[1]))


def _plain_callable(processor: Any) -> Callable[[Any], Any]:
    """A callable PIL image -> pixel values; a Hugging Face processor is called with `return_tensors`."""
    if hasattr(processor, "model_input_names"):
        return lambda image: processor(images=image, return_tensors="np")
    if not callable(processor):
        raise ProbeError(f"{type(processor).__name__} is neither an image processor nor a callable")
    return processor
