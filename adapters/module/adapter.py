"""Any `nn.Module` that scores classes of a picture, with whatever prepares its input."""

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
from grounding.adapter.inputs import Inputs
from grounding.adapter.patch_layout import Layout
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import ModelStructure, Stack
from grounding.core.errors import GroundingError, LayerError, ModelError, ProbeError
from grounding.core.printable import one_line

# Side of the blank picture that layers are found with; `preprocess` makes of it what it makes of any.
SIDE = 256
MODES = ("RGB", "L")
UNRECORDED = "attention of a module that is not known cannot be recorded"


class ModuleAdapter(ClassAdapter):
    """Any module: pixel values (B, C, H, W) -> scores of classes (B, classes), or (B,) of one class, alone, first in a
    tuple, or as `logits` of an object or a dict (of a dict without: the only value that is a tensor).

    Parameters
    ----------
    model: left as it is, in-place operations included. One score alone counts as the log odds of a yes.
    tap: the layer that Grad-CAM reads: a dotted path, an index over the layers with a spatial size (-1: the last that
        has one), "children:-3" over the model's children, or the module itself. Default: the last layer with a spatial
        size whose cells the scores depend on.
    preprocess: PIL picture -> pixel values (C, H, W), or a Hugging Face image processor. Its geometry is measured where
        its steps are not known; it may do what resize, crop and pad do.
    geometry: what `preprocess` does to places (PIL picture -> PIL picture or pixel values), to be measured in its stead
        where it does more to levels than scale and shift them: normalises picture by picture, equalises, bends, clips.
    labels: names of the classes, in order or by index.
    mode: of the pictures that `preprocess` takes: "RGB" or "L" (grey).
    by_itself: every class has a probability of its own (sigmoid).
    prefix: how many tokens stand before the patches in a layer of tokens, what is over stands behind them. None: all
        that are over are taken to stand before; explanations warn of it.

    Layers are found by passing pictures of noise: a layer has a spatial size if its shape could be maps (or tokens as
    many as the cells of the last map) and a changed quarter of the picture changes that quarter of it most. Maps of
    convolutions are taken to divide the whole input evenly (their padding is not followed).
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
            raise ModelError(f"mode {mode!r} of pictures is not known (there are: {', '.join(MODES)})")
        if not callable(preprocess):
            raise ModelError(f"preprocess must be a callable (PIL picture -> pixel values), got {preprocess!r}")
        if isinstance(model, torch.jit.ScriptModule):
            raise ModelError("layers of a scripted or traced module cannot be watched: give the module it was made of")
        if prefix is not None and (not isinstance(prefix, int) or isinstance(prefix, bool) or prefix < 0):
            raise ModelError(f"prefix counts the tokens before the patches: 0 or more, got {prefix!r}")
        self.model, self.preprocess, self.mode, self._prefix = model, preprocess, mode, prefix
        self._moves = None if geometry is None else partial(_moved, geometry)
        self.info = info or ModelInfo(type(model).__name__, "nn.Module", processor={"type": repr(preprocess)})
        sample = self._sample()
        self._channels = sample.shape[1]
        self._found = SpatialLayers(model, lambda pixels: scores_of(model(pixels)), sample, self.info.id, prefix)
        count = self._found.scores
        self.labels = ClassNames(_names(labels, count), self.info.id)
        self.by_itself = by_itself or count == 1
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        children = Stack(tuple(name for name, _ in model.named_children()))
        self._structure = ModelStructure(
            {"children": children, "vision": Stack(self._found.paths)},
            self._found.last_live,
            "none",
            self._found.before,
            pyramid=True,
            unrecorded=UNRECORDED if self._found.tokens else "it has none",
        )
        # The engine names it where the tap is dead.
        self.live_layer = self._structure.layer
        if layer is not None:
            path = self._path_of(layer) if isinstance(layer, nn.Module) else self.resolve(str(layer))
            self._structure = replace(self._structure, layer=self._checked(path))

    @property
    def structure(self) -> ModelStructure:
        """Stacks `vision`, all layers with a spatial size in the order they finish, and `children`, the model's own."""
        return self._structure

    def prepare_images(self, images: Sequence[Any]) -> Inputs:
        """Pixel values (B, C, H, W). Raises ModelError for several pictures where the model normalises over a batch."""
        batch = next((type(m).__name__ for m in self.model.modules() if _of_batch(m)), None)
        if batch and len(images) > 1:
            raise ModelError(f"{batch} has no running statistics: pictures would change each other, use batch_size=1")
        try:
            return prepare_images(self, self.preprocess, images, self._grid_of, self.mode, self._moves)
        except ProbeError as error:
            hint = "" if self._moves else "; geometry= takes a callable that does the same to places alone"
            raise ProbeError(f"{error}{hint}") from None

    def logits(self, inputs: Inputs) -> Float[Tensor, "B C"]:
        """What the model gives."""
        # A copy: a model may normalise its input in place.
        pixels = inputs.tensors["pixel_values"]
        return scores_of(self.model(pixels.clone()), len(pixels))

    def sequence(self, path: str) -> tuple[int, bool]:
        """Tokens before the patches, and whether others stand behind them."""
        return self._found.sequence(path)

    def layout(self, hidden: Float[Tensor, "..."], grid: tuple[int, int], path: str = "") -> Layout:
        """How the patches lie in a layer's output. Raises LayerError where they do not lie as the picture does."""
        if path in self._found.flats:
            raise self._found.flat(path)
        return super().layout(hidden, grid, path)

    def _doubts(self) -> list[str]:
        doubts, over = super()._doubts(), self._found.over
        if self._prefix is None and over:
            some = f"{over} token{'s' * (over > 1)}"
            doubts.append(
                f"{some} more than the cells of layer {self._found.last_map!r}: taken to stand before the patches; "
                "say prefix= if not"
            )
        return doubts

    # ------------------------------------------------------------------ where things are

    def _sample(self) -> Tensor:
        """A blank picture as the model takes it. Raises ModelError where it does not."""
        pixels = pixels_of(self.preprocess, Image.new(self.mode, (SIDE, SIDE))).to(self.device, self.dtype)[None]
        try:
            with Recorder(self.model):
                scores_of(self.model(pixels.clone()))
        except GroundingError:
            raise
        except Exception as error:
            raise ModelError(self._refusal(pixels, error)) from error
        return pixels

    def _refusal(self, pixels: Tensor, error: Exception) -> str:
        """What to say where the model fails on a blank picture."""
        first = next((m for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
        channels = pixels.shape[1]
        if first is not None and first.in_channels != channels:
            hint = "; mode='L' gives it grey pictures" if first.in_channels == 1 and self.mode == "RGB" else ""
            return (
                f"preprocess gives {channels} channels, the first convolution of {self.info.id} takes "
                f"{first.in_channels}{hint}"
            )
        why = one_line(error, 200)
        return (
            f"{self.info.id} fails on a blank picture of {SIDE} x {SIDE}, {tuple(pixels.shape)} after preprocess: "
            f"{type(error).__name__}: {why}"
        )

    def _path_of(self, module: nn.Module) -> str:
        """Of a module inside the model. Raises LayerError."""
        path = next((path for path, one in self.model.named_modules() if one is module), "")
        if not path:
            raise LayerError(f"the {type(module).__name__} given as tap is no layer inside {self.info.id}")
        return path

    def _checked(self, path: str) -> str:
        """A tap that has a spatial size. Raises LayerError naming the last that has one."""
        if path in self._found.flats:  # what did not run, or ran twice, the recorder refuses in its own words
            raise self._found.flat(path)
        return path

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the tap for an input of this size. Raises LayerError."""
        if (height, width) not in self._grids:
            blank = torch.zeros(1, self._channels, height, width, device=self.device, dtype=self.dtype)
            self._grids[height, width] = self._found.grid(self._structure.layer, blank)
        return self._grids[height, width]


def _moved(geometry: Callable[[Image.Image], Any], image: Image.Image) -> Any:
    """What `geometry` made of a picture, as pixel values."""
    made = geometry(image)
    return np.atleast_3d(np.asarray(made)).transpose(2, 0, 1) if isinstance(made, Image.Image) else made


def scores_of(output: Any, images: int = 1) -> Float[Tensor, "B C"]:
    """The scores in whatever a model returns for B pictures; (B,) are those of one class. Raises ModelError where
    there are none."""
    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        if "logits" not in output and len(tensors) != 1:
            keys = ", ".join(map(repr, output)) or "none"
            raise ModelError(
                f"the model gives a dict with the keys {keys}, expected scores of shape (pictures, classes) as "
                "'logits', or as its only tensor"
            )
        output = output["logits"] if "logits" in output else tensors[0]
    elif isinstance(output, list | tuple):
        output = output[0] if output else None
    if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:] == (1, 1):
        output = output[:, :, 0, 0]
    if isinstance(output, Tensor) and output.ndim < 2 and output.numel() == images:
        output = output.reshape(images, 1)  # one score each, squeezed
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"the model gives {shape}, expected scores of shape (pictures, classes)")
    return output


def _names(labels: Sequence[str] | Mapping[Any, str] | None, count: int) -> tuple[str, ...]:
    if labels is None:
        return tuple(f"class {i}" for i in range(count))
    if isinstance(labels, str):
        raise ModelError(f"labels={labels!r} is a text, not a list of class names: give one name for each class")
    pairs = labels.items() if isinstance(labels, Mapping) else enumerate(labels)
    # The keys of JSON are texts.
    named = [(int(key) if isinstance(key, str) and key.isdecimal() else key, name) for key, name in pairs]
    keys = [key for key, _ in named]
    if any(isinstance(key, str) for key in keys) or sorted(keys) != list(range(count)):
        raise ModelError(f"labels name {len(named)} classes, the model gives {count} scores: one name for each")
    return tuple(str(dict(named)[i]) for i in range(count))


def _of_batch(module: nn.Module) -> bool:
    """Whether a module's answer for one picture depends on the others, in eval mode, too."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
