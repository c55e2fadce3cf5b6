"""Adapter for any `nn.Module` that scores classes of an image, with any preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from adapters.module.spatial_layers import SpatialLayers
from adapters.shared.images import pixels_of, prepare_images
from grounding.adapter.base import ModelInfo
from grounding.adapter.classification import ClassAdapter, ClassNames
from grounding.adapter.inputs import ImageInputs, Inputs
from grounding.adapter.patch_tokens import PatchTokens
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import ModelStructure, Stack
from grounding.core.errors import GroundingError, LayerError, ModelError, ProbeError
from grounding.core.printable import one_line

# Side in pixels, before `preprocess`, of the blank image that layers are found with.
SIDE = 256
MODES = ("RGB", "L")
UNRECORDED = "attention of an unknown module cannot be recorded"


class ModuleAdapter(ClassAdapter):
    """Adapter around any module from pixel values (B, C, H, W) to class scores (B, classes), or (B,) of a single class.

    The scores are the module's output, the first item of a tuple, or `logits` of an object or a dict (of a dict without
    `logits`: its only tensor).

    Parameters
    ----------
    model: the module; it is not changed, and may use in-place operations. A single score counts as the log odds of yes.
    layer: the layer of Grad-CAM: a dotted path, an index over the layers with a spatial size (-1: the last of them),
        "children:-3" over the model's children, or the module itself. Default: the last layer with a spatial size whose
        cells the scores depend on.
    preprocess: PIL image -> pixel values (C, H, W), or a Hugging Face image processor. Its geometry is measured unless
        its steps are known; it may resize, crop and pad.
    geometry: the geometric steps of `preprocess` (PIL image -> PIL image or pixel values), measured instead of it.
        Needed if it changes values other than by a fixed scale and offset: normalises each image, equalises, clips.
    labels: names of the classes, in order or by index.
    mode: of the images that `preprocess` takes: "RGB" or "L" (grey).
    by_itself: every class has a probability of its own (sigmoid).
    prefix: number of tokens before the patches in a layer of tokens; further ones follow the patches. None: all other
        tokens are assumed to be before the patches, and explanations warn of it.

    Layers are found by forward passes of noise images: a layer has a spatial size if its shape could be feature maps
    (or as many tokens as the last map has cells) and a change in one quarter of the image changes that quarter of the
    layer most. Feature maps are assumed to divide the whole input evenly (the padding of convolutions is ignored).
    Raises ModelError, LayerError.
    """

    def __init__(
        self,
        model: Any,
        layer: str | int | nn.Module | None = None,
        *,
        preprocess: Any,
        geometry: Callable[[Image.Image], Any] | None = None,
        labels: Sequence[str] | Mapping[Any, str] | None = None,
        mode: str = "RGB",
        by_itself: bool = False,
        prefix: int | None = None,
        info: ModelInfo | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"ModuleAdapter needs a torch module, got {type(model).__name__}")
        if mode not in MODES:
            raise ModelError(f"unknown image mode {mode!r} (there are: {', '.join(MODES)})")
        if not callable(preprocess):
            raise ModelError(f"preprocess must be a callable (PIL image -> pixel values), got {preprocess!r}")
        if isinstance(model, torch.jit.ScriptModule):
            raise ModelError("a scripted or traced module takes no hooks: give the module it was made from")
        if prefix is not None and (not isinstance(prefix, int) or isinstance(prefix, bool) or prefix < 0):
            raise ModelError(f"prefix is the number of tokens before the patches, 0 or more, got {prefix!r}")
        self.model, self.preprocess, self.mode, self._prefix = model, preprocess, mode, prefix
        self._moves = None if geometry is None else partial(_moved, geometry)
        self.info = info or ModelInfo(type(model).__name__, "nn.Module", processor={"type": repr(preprocess)})
        sample = self._sample()
        self._channels = sample.shape[1]
        self._found = SpatialLayers(model, lambda pixels: scores_of(model(pixels)), sample, self.info.id, prefix)
        count = self._found.scores
        self.class_names = ClassNames(_names(labels, count), self.info.id)
        self.by_itself = by_itself or count == 1
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        children = Stack(tuple(name for name, _ in model.named_children()))
        self._structure = ModelStructure(
            {"children": children, "vision": Stack(self._found.paths)},
            self._found.last_live,
            "none",
            prefix=self._found.before,
            pyramid=True,
            unrecorded=UNRECORDED if self._found.tokens else "it has none",
            live_layer=self._found.last_live,
        )
        if layer is not None:
            if isinstance(layer, nn.Module):
                path = self._path_of(layer)
            else:
                path = self._structure.find_layer(model, str(layer))
            self._structure = replace(self._structure, default_layer=self._checked(path))

    def structure(self, kind: str) -> ModelStructure:  # noqa: ARG002
        """Structure with the stacks `vision`, all layers with a spatial size in the order they finish, and `children`,
        the model's children."""
        return self._structure

    def prepare_images(self, images: Sequence[Any]) -> ImageInputs:
        """Inputs with pixel values (B, C, H, W). Raises ModelError for several images if the model normalises over the
        batch, ProbeError if the geometry of `preprocess` cannot be measured."""
        batch = next((type(m).__name__ for m in self.model.modules() if _of_batch(m)), None)
        if batch and len(images) > 1:
            raise ModelError(f"{batch} has no running statistics: images would change each other, use batch_size=1")
        try:
            return prepare_images(self, self.preprocess, images, self._grid_of, self.mode, self._moves)
        except ProbeError as error:
            hint = "" if self._moves else "; give its geometric steps alone as geometry="
            raise ProbeError(f"{error}{hint}") from None

    def encode_images(self, images: ImageInputs) -> Float[Tensor, "B C"]:
        """The scores of all classes."""
        # A copy, because a model may normalise its input in place.
        pixels = images.tensors["pixel_values"]
        return scores_of(self.model(pixels.clone()), len(pixels))

    def patch_tokens(self, path: str, inputs: Inputs, shape: tuple[int, ...]) -> tuple[PatchTokens, ...]:
        """Positions of the patches in a layer's output. Raises LayerError if the layer has no spatial size."""
        if path in self._found.not_spatial:
            raise self._found.error(path)
        prefix, tail = self._found.sequence(path)
        return self.regular_patch_tokens(path, inputs, shape, prefix, tail=tail)

    def _text_warnings(self) -> list[str]:
        warnings, extra = super()._text_warnings(), self._found.extra
        if self._prefix is None and extra:
            some = f"{extra} token{'s' * (extra > 1)}"
            warnings.append(
                f"{some} more than the cells of layer {self._found.last_map!r}: assumed to be before the patches; "
                "give prefix= if not"
            )
        return warnings

    # ------------------------------------------------------------------ finding layers

    def _sample(self) -> Tensor:
        """Pixel values (1, C, H, W) of a blank image. Raises ModelError if the model fails on them."""
        pixels = pixels_of(self.preprocess, Image.new(self.mode, (SIDE, SIDE))).to(self.device, self.dtype)[None]
        try:
            with Recorder(self.model):
                scores_of(self.model(pixels.clone()))
        except GroundingError:
            raise
        except Exception as error:
            raise ModelError(self._failure(pixels, error)) from error
        return pixels

    def _failure(self, pixels: Tensor, error: Exception) -> str:
        """Message for a model that fails on a blank image."""
        first = next((m for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = pixels.shape[1]
        if first is not None and first.in_channels != channels:
            hint = "; mode='L' gives it grey images" if first.in_channels == 1 and self.mode == "RGB" else ""
            return (
                f"preprocess returns {channels} channels, the first convolution of {self.info.id} takes "
                f"{first.in_channels}{hint}"
            )
        return (
            f"{self.info.id} fails on a blank image of {SIDE} x {SIDE}, {tuple(pixels.shape)} after preprocess: "
            f"{type(error).__name__}: {one_line(error, 200)}"
        )

    def _path_of(self, module: nn.Module) -> str:
        """Path of a module inside the model. Raises LayerError."""
        path = next((path for path, one in self.model.named_modules() if one is module), "")
        if not path:
            raise LayerError(f"the {type(module).__name__} given as layer is no module inside {self.info.id}")
        return path

    def _checked(self, path: str) -> str:
        """The same path. Raises LayerError for a layer without a spatial size, naming the last that has one."""
        if (
            path in self._found.not_spatial
        ):  # for a layer that did not run, or ran twice, the recorder raises its own error
            raise self._found.error(path)
        return path

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the default layer for an input of this size. Raises LayerError."""
        if (height, width) not in self._grids:
            blank = torch.zeros(1, self._channels, height, width, device=self.device, dtype=self.dtype)
            self._grids[height, width] = self._found.grid(self._structure.default_layer, blank)
        return self._grids[height, width]


def _moved(geometry: Callable[[Image.Image], Any], image: Image.Image) -> Any:
    """Pixel values of the image that `geometry` returns."""
    moved = geometry(image)
    return np.atleast_3d(np.asarray(moved)).transpose(2, 0, 1) if isinstance(moved, Image.Image) else moved


def scores_of(output: Any, images: int = 1) -> Float[Tensor, "B C"]:
    """The class scores in a model's output for B images; scores (B,) are those of a single class.

    Raises ModelError if there are none.
    """
    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        if "logits" not in output and len(tensors) != 1:
            keys = ", ".join(map(repr, output)) or "none"
            raise ModelError(
                f"the model returns a dict with the keys {keys}, expected scores of shape (images, classes) as "
                "'logits', or as its only tensor"
            )
        output = output["logits"] if "logits" in output else tensors[0]
    elif isinstance(output, list | tuple):
        output = output[0] if output else None
    if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:] == (1, 1):
        output = output[:, :, 0, 0]
    if isinstance(output, Tensor) and output.ndim < 2 and output.numel() == images:
        output = output.reshape(images, 1)  # a single class, squeezed
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"the model returns {shape}, expected scores of shape (images, classes)")
    return output


def _names(labels: Sequence[str] | Mapping[Any, str] | None, count: int) -> tuple[str, ...]:
    if labels is None:
        return tuple(f"class {i}" for i in range(count))
    if isinstance(labels, str):
        raise ModelError(f"labels={labels!r} is a string, not a list of class names: give one name for each class")
    pairs = labels.items() if isinstance(labels, Mapping) else enumerate(labels)
    # The keys of JSON are strings.
    named = [(int(key) if isinstance(key, str) and key.isdecimal() else key, name) for key, name in pairs]
    keys = [key for key, _ in named]
    if any(isinstance(key, str) for key in keys) or sorted(keys) != list(range(count)):
        raise ModelError(f"labels name {len(named)} classes, the model returns {count} scores: give one name for each")
    return tuple(str(dict(named)[i]) for i in range(count))


def _of_batch(module: nn.Module) -> bool:
    """Whether a module's output for one image depends on the others of the batch even in eval mode."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
