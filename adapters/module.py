"""Any `nn.Module` that scores classes of a picture, with whatever prepares its input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from adapters._images import pixels_of, prepare_images
from adapters._spatial import Ran, all_that_ran
from grounding.adapter import ModelInfo
from grounding.classes import ClassAdapter, Labels
from grounding.errors import LayerError, ModelError
from grounding.recorder import Recorder
from grounding.types import Inputs, Sites, Stack

# Side of the blank picture that layers are found with; `preprocess` makes of it what it makes of any.
SIDE = 256
# More tokens before the patches than any known transformer has (CLS and registers): then it is no run of patches.
MOST_PREFIX = 16
MODES = ("RGB", "L")
# They give the same grid whatever the picture's shape.
ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
UNRECORDED = "attention of a module that is not known cannot be recorded"


class ModuleAdapter(ClassAdapter):
    """Any module: pixel values (B, C, H, W) -> scores of classes (B, classes), or (B,) of one class, alone, first in a
    tuple, or as `logits` of an object or a dict (of a dict without: the only value that is a tensor).

    Parameters
    ----------
    model: left as it is, in-place operations included. One score alone counts as the log odds of a yes.
    tap: the layer that Grad-CAM reads: a dotted path, an index over the layers with a spatial size (-1: the last that
        has one), or "children:-3" over the model's children. Default: the last layer with a spatial size whose cells
        the scores depend on.
    preprocess: PIL picture -> pixel values (C, H, W), or a Hugging Face image processor. Its geometry is measured where
        its steps are not known; it may do what resize, crop and pad do.
    labels: names of the classes, in order or by index.
    mode: of the pictures that `preprocess` takes: "RGB" or "L" (grey).
    by_itself: every class has a probability of its own (sigmoid).
    prefix: how many tokens stand before the patches in a layer of tokens, what is over stands behind them. None: all
        that are over are taken to stand before; explanations warn of it.

    Layers are found by a pass of a blank picture. Maps of convolutions are taken to divide the whole input evenly
    (their padding is not followed); a layer of tokens has the grid of the last map.
    Raises ModelError, LayerError.
    """

    example = "a model of your own"

    def __init__(
        self,
        model: Any,
        tap: str | int | None = None,
        *,
        preprocess: Any,
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
        if prefix is not None and (not isinstance(prefix, int) or prefix < 0):
            raise ModelError(f"prefix counts the tokens before the patches: 0 or more, got {prefix!r}")
        self.model, self.preprocess, self.mode, self._prefix = model, preprocess, mode, prefix
        self.info = info or ModelInfo(type(model).__name__, "nn.Module", processor={"type": repr(preprocess)})
        sample = self._sample()
        self._channels, *size = sample.shape[1:]
        self._size = (size[0], size[1])
        scores: list[Tensor] = []
        self._ran = all_that_ran(model, lambda: scores.append(scores_of(model(sample))))
        count = scores[0].shape[-1]
        self.labels = Labels(_names(labels, count), self.info.id)
        self.by_itself = by_itself or count == 1
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self._tokens, self._over = frozenset[str](), 0
        self._sites = self._places()
        # The engine names it where the tap is dead.
        self.live_tap = self._sites.tap
        if tap is not None:
            self._sites = replace(self._sites, tap=self._checked(self.resolve(str(tap))))

    @property
    def sites(self) -> Sites:
        """Stacks `vision`, all layers with a spatial size in the order they finish, and `children`, the model's own."""
        return self._sites

    def see(self, images: Sequence[Any]) -> Inputs:
        """Pixel values (B, C, H, W). Raises ModelError for several pictures where the model normalises over a batch."""
        batch = next((type(m).__name__ for m in self.model.modules() if _of_batch(m)), None)
        if batch and len(images) > 1:
            raise ModelError(f"{batch} has no running statistics: pictures would change each other, use batch_size=1")
        found = prepare_images(self, self.preprocess, images, patch=self._grid_of, mode=self.mode)
        return Inputs(found.pictures, found.geometry, (), (), {"pixel_values": found.pixel_values}, found.warnings)

    def logits(self, inputs: Inputs) -> Float[Tensor, "B C"]:
        """What the model gives."""
        # A copy: a model may normalise its input in place.
        pixels = inputs.tensors["pixel_values"]
        return scores_of(self.model(pixels.clone()), len(pixels))

    def sequence(self, path: str) -> tuple[int, bool]:
        """Tokens before the patches, and whether others stand behind them."""
        prefix = self.sites.prefix
        return prefix, self._over > prefix and path in self._tokens

    def _doubts(self) -> list[str]:
        doubts = super()._doubts()
        if self._prefix is None and self._over:
            some = f"{self._over} token{'s' * (self._over > 1)}"
            doubts.append(
                f"{some} more than the cells of layer {list(self._maps)[-1]!r}: taken to stand before the patches; "
                "say prefix= if not"
            )
        return doubts

    # ------------------------------------------------------------------ where things are

    def _sample(self) -> Tensor:
        """A blank picture as the model takes it. Raises ModelError where its channels are not the model's."""
        pixels = pixels_of(self.preprocess, Image.new(self.mode, (SIDE, SIDE))).to(self.device, self.dtype)
        first = next((m for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
        if first is not None and first.in_channels != len(pixels):
            hint = "; mode='L' gives it grey pictures" if first.in_channels == 1 and self.mode == "RGB" else ""
            raise ModelError(
                f"preprocess gives {len(pixels)} channels, the first convolution of {self.info.id} takes "
                f"{first.in_channels}{hint}"
            )
        return pixels[None]

    @cached_property
    def _maps(self) -> dict[str, tuple[int, int]]:
        """Path -> (rows, columns) of the layers that give maps of more than one cell."""
        adaptive = {path for path, module in self.model.named_modules() if isinstance(module, ADAPTIVE)}
        found = {one.path: one.cells(self._size) for one in self._ran if one.path not in adaptive}
        return {path: cells for path, cells in found.items() if cells}

    def _places(self) -> Sites:
        """The sites with the last spatial layer as tap."""
        children = Stack(tuple(name for name, _ in self.model.named_children()))
        maps = list(self._maps)
        if not maps:
            raise LayerError(f"{self.info.id} has no layer with a spatial size at {self._size[1]} x {self._size[0]}")
        self._over, tokens = self._tokens_over(maps[-1])
        self._tokens, prefix = tokens, self._over if self._prefix is None else self._prefix
        spatial = tuple(one.path for one in self._ran if one.path in self._maps or one.path in tokens)
        stacks = {"children": children, "vision": Stack(spatial)}
        tap = self._last_live(spatial, prefix) if tokens else spatial[-1]
        return Sites(
            stacks, tap, "none", prefix, pyramid=not tokens, unrecorded=UNRECORDED if tokens else "it has none"
        )

    def _last_live(self, paths: Sequence[str], prefix: int) -> str:
        """The last of these layers whose patches the scores depend on: behind it only a class token is read."""
        size = (1, self._channels, *self._size)
        patches = slice(prefix, prefix + math.prod(list(self._maps.values())[-1]))
        waves = torch.arange(math.prod(size), device=self.device, dtype=self.dtype).sin().reshape(size)
        with Recorder(self.model, dict.fromkeys(paths, True)) as recorder:
            total = scores_of(self.model(waves)).sum()
        found = torch.autograd.grad(total, [recorder.outputs[path] for path in paths], allow_unused=True)
        live = [
            path
            for path, gradient in zip(paths, found, strict=True)
            if gradient is not None and (gradient if gradient.ndim == 4 else gradient[:, patches]).any()
        ]
        return live[-1] if live else paths[-1]

    def _tokens_over(self, last_map: str) -> tuple[int, frozenset[str]]:
        """Layers that give a token for each cell of the last map, and how many they have over. Raises ModelError."""
        rows, columns = self._maps[last_map]
        least = self._prefix or 0
        counts = {one.path: one.shape[1] - rows * columns for one in self._ran if len(one.shape) == 3}
        counts = {path: over for path, over in counts.items() if least <= over <= max(MOST_PREFIX, least)}
        if not counts and least:
            raise ModelError(
                f"prefix={least}, but no layer of {self.info.id} has {least} or more tokens over the "
                f"{rows} x {columns} cells of layer {last_map!r}"
            )
        last = list(counts.values())[-1] if counts else 0
        return last, frozenset(path for path, over in counts.items() if over == last)

    def _checked(self, path: str) -> str:
        """A tap that has a spatial size. Raises LayerError naming the last that has one."""
        spatial = self._sites.stacks["vision"].blocks
        ran = {one.path: one for one in self._ran}
        if path in spatial or path not in ran:  # what did not run, or ran twice, the recorder refuses in its own words
            return path
        raise _flat(ran[path], spatial[-1], self._maps)

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the tap for an input of this size; of tokens those of the last map. Raises LayerError."""
        if (height, width) not in self._grids:
            blank = torch.zeros(1, self._channels, height, width, device=self.device, dtype=self.dtype)
            tap = self._sites.tap
            source = tap if self._sites.pyramid else list(self._maps)[-1]
            with Recorder(self.model, dict.fromkeys((tap, source), False)) as recorder:
                self.model(blank)
                recorder.check()
            found = Ran(source, tuple(recorder.outputs[source].shape))
            cells = found.cells((height, width))
            if cells is None:
                ran = all_that_ran(self.model, lambda: self.model(blank))
                maps = {one.path: one.cells((height, width)) for one in ran}
                spatial = [path for path, own in maps.items() if own]
                raise _flat(found, spatial[-1] if spatial else "", maps)
            self._grids[height, width] = cells
        return self._grids[height, width]


def scores_of(output: Any, pictures: int = 1) -> Float[Tensor, "B C"]:
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
    if isinstance(output, Tensor) and output.ndim < 2 and output.numel() == pictures:
        output = output.reshape(pictures, 1)  # one score each, squeezed
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


def _flat(found: Ran, last: str, maps: Mapping[str, tuple[int, int] | None]) -> LayerError:
    """What to say of a tap without a spatial size."""
    size = " x ".join(map(str, found.shape[2:])) if len(found.shape) == 4 else f"its output is {found.shape}"
    cells = maps.get(last)
    where = f": the last layer that has one is {last!r}" if last else ", nor has any other layer"
    where += f" ({cells[0]} x {cells[1]})" if cells else ""
    return LayerError(f"layer {found.path!r} has no spatial size ({size}){where}")


def _of_batch(module: nn.Module) -> bool:
    """Whether a module's answer for one picture depends on the others, in eval mode, too."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
