"""Find the layers of any module that have a spatial size, by running it instead of relying on names or shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from adapters.module.spatial_response import FEW, LEAST_RATIO_OF_SQUARES, is_spatial, spatial_response
from adapters.shared.layer_outputs import LayerOutput, record_outputs
from grounding.adapter.patch_tokens import TOKENS, Layout, find_layout
from grounding.adapter.recorder import Recorder, find_module
from grounding.core.errors import LayerError, ModelError

# Known transformers have fewer tokens before the patches (CLS and registers): with more, tokens are no patches.
MOST_PREFIX = 16
# Their output has the same grid whatever the shape of the image.
ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class SpatialLayers:
    """The layers of a module whose cells follow the positions of the image: feature maps, and as many tokens as the
    last map has cells (or 4, 16, ... times as many, before tokens are merged).

    `run` computes scores (1, classes) from pixel values (1, C, H, W) such as `sample`; `name` names the model in
    messages; `prefix` is the number of tokens before the patches (None: all tokens but the patches).
    Raises LayerError if there is no feature map, ModelError if no layer has `prefix` tokens beside the patches.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[Tensor], Tensor], sample: Tensor, name: str, prefix: int | None
    ) -> None:
        self.model, self.run, self.name, self._prefix = model, run, name, prefix
        self.size = (int(sample.shape[-2]), int(sample.shape[-1]))
        scores: list[Tensor] = []
        self.outputs = {one.path: one for one in record_outputs(model, lambda: scores.append(run(sample.clone())))}
        self.scores = int(scores[0].shape[-1])
        layouts = {path: one.layout(self.size) for path, one in self.outputs.items()}
        could = {path: layout for path, layout in layouts.items() if layout or self.outputs[path].tokens}
        self._changes = spatial_response(model, run, sample, could)
        if not self.maps:
            raise LayerError(f"{name} has no layer with a spatial size at {self.size[1]} x {self.size[0]}")
        self.last_map, self.last = list(self.maps.items())[-1]
        self.extra = self._extra_tokens()
        self.before = self.extra if prefix is None else prefix
        ordered = frozenset(path for path, over in self._counts.items() if over == self.extra) | self._unmerged()
        self.tokens = ordered | (self._same_count() if ordered else frozenset())
        self.paths = tuple(path for path in self.outputs if path in self.maps or path in self.tokens)
        self.last_live = self._last_live(sample, [path for path in self.paths if path in self.maps or path in ordered])

    @cached_property
    def maps(self) -> dict[str, tuple[int, int]]:
        """Path -> (rows, columns) of the layers whose output are feature maps of the image with more than one cell."""
        adaptive = {path for path, module in self.model.named_modules() if isinstance(module, ADAPTIVE)}
        found = {path: one.cells(self.size) for path, one in self.outputs.items() if path not in adaptive}
        return {
            path: cells
            for path, cells in found.items()
            if cells and path in self._changes and self._is_map(path, cells)
        }

    def _is_map(self, path: str, cells: tuple[int, int]) -> bool:
        """Whether the cells change with the image. Cells that might be attention weights between tokens must follow its
        positions too; of convolutions this cannot be required, as a cell may depend on the whole image."""
        weights = cells[0] == cells[1] and cells[0] in self._tokens
        return is_spatial(self._changes[path], LEAST_RATIO_OF_SQUARES) if weights else bool(self._changes[path].any())

    @cached_property
    def _tokens(self) -> frozenset[int]:
        """Possible numbers of tokens of an attention: those of a layer, or the cells of a map and a prefix."""
        cells = {prod(own) for one in self.outputs.values() if (own := one.cells(self.size))}
        before = {count + over for count in cells for over in range(MOST_PREFIX + 1) if count >= FEW}
        return frozenset(before | {one.tokens for one in self.outputs.values() if one.tokens >= FEW})

    @property
    def not_spatial(self) -> frozenset[str]:
        """The layers that ran and have no spatial size."""
        return frozenset(self.outputs) - frozenset(self.paths)

    @property
    def map_shaped(self) -> frozenset[str]:
        """The layers without a spatial size whose shape could have one."""
        return self.not_spatial.intersection(self._changes)

    def sequence(self, path: str) -> tuple[int, bool]:
        """Number of tokens before the patches in a layer, and whether others follow them."""
        tail = self.extra > self.before and path in self.tokens
        return self.before, tail and self.outputs[path].tokens == prod(self.last) + self.extra

    def grid(self, path: str, blank: Tensor) -> tuple[int, int]:
        """(rows, columns) of a layer for an input of the size of `blank`. Raises LayerError."""
        height, width = (int(side) for side in blank.shape[-2:])
        with Recorder(self.model, dict.fromkeys((path, self.last_map), False)) as recorder:
            self.run(blank.clone())
            recorder.check()
        shapes = {own: tuple(output.shape) for own, output in recorder.outputs.items()}
        cells = LayerOutput(self.last_map, shapes[self.last_map]).cells((height, width))
        if len(shapes[path]) == 4:
            cells = LayerOutput(path, shapes[path]).cells((height, width))
        elif cells:
            found = self._layout_of(path, shapes[path], cells)
            cells = (found.rows, found.columns) if found else None
        if cells:
            return cells
        ran = record_outputs(self.model, lambda: self.run(blank.clone()))
        maps = {one.path: one.cells((height, width)) for one in ran if one.path in self.maps}
        raise _error(LayerOutput(path, shapes[path]), maps, map_shaped=False)

    def error(self, path: str) -> LayerError:
        """The error for a layer without a spatial size; it names the last layer that has one."""
        layout = self._layout_of(self.last_live, self.outputs[self.last_live].shape, self.last)
        last = {self.last_live: (layout.rows, layout.columns) if layout else None}
        return _error(self.outputs[path], last, map_shaped=path in self.map_shaped)

    def _extra_tokens(self) -> int:
        """Number of tokens beside the patches in the last layer of tokens. Raises ModelError."""
        counts = list(self._counts.values())
        if not counts and self._prefix:
            raise ModelError(
                f"prefix={self._prefix}, but no layer of {self.name} has {self._prefix} or more tokens beside the "
                f"{self.last[0]} x {self.last[1]} cells of layer {self.last_map!r}"
            )
        return counts[-1] if counts else 0

    @cached_property
    def _counts(self) -> dict[str, int]:
        """Path -> number of tokens beside the patches, of the layers with one token for each cell of the last map, row
        by row."""
        count, least = prod(self.last), self._prefix or 0
        over = {path: one.tokens - count for path, one in self.outputs.items() if one.tokens and path in self._changes}
        over = {path: number for path, number in over.items() if least <= number <= max(MOST_PREFIX, least)}
        before = {path: number if self._prefix is None else self._prefix for path, number in over.items()}
        return {
            path: number
            for path, number in over.items()
            if self._in_rows(path, Layout(TOKENS, *self.last, before[path]))
        }

    def _unmerged(self) -> frozenset[str]:
        """Layers of tokens before a merge, with 4, 16, ... times as many."""
        others = [path for path in self._changes if self.outputs[path].tokens and path not in self._counts]
        layouts = {path: find_layout(self.outputs[path].shape, self.last, self.before, pyramid=True) for path in others}
        return frozenset(path for path, layout in layouts.items() if layout and self._in_rows(path, layout))

    def _same_count(self) -> frozenset[str]:
        """Layers with the token count of those in order that respond to the image, but mix tokens too much to measure
        their order."""
        count = prod(self.last) + self.extra
        own = {path: change for path, change in self._changes.items() if self.outputs[path].tokens == count}
        return frozenset(path for path, change in own.items() if change.any())

    def _in_rows(self, path: str, layout: Layout) -> bool:
        """Whether the tokens are the cells of the image, row by row."""
        count = layout.rows * layout.columns
        patches = self._changes[path][:, layout.prefix : layout.prefix + count]
        return is_spatial(patches.reshape(-1, layout.rows, layout.columns))

    def _layout_of(self, path: str, shape: tuple[int, ...], last: tuple[int, int]) -> Layout | None:
        """The layout of an output, tokens or feature maps, if the last map has these cells."""
        before, tail = self.sequence(path)
        return find_layout(shape, last, before, tail=tail, pyramid=True)

    def _last_live(self, sample: Tensor, paths: Sequence[str]) -> str:
        """The last layer whose patches the scores depend on; after it only a class token is pooled."""
        waves = torch.arange(sample.numel(), device=sample.device).sin().reshape(sample.shape).to(sample.dtype)
        with Recorder(self.model, dict.fromkeys(paths, True)) as recorder:
            total = self.run(waves).sum()
        if not total.requires_grad:
            raise ModelError(
                f"no gradient passes {self.name}: its forward runs under torch.no_grad, or its scores are detached "
                "from the layers"
            )
        outputs = [recorder.outputs[path] for path in paths]
        gradients = dict(zip(paths, torch.autograd.grad(total, outputs, allow_unused=True), strict=True))
        for path in reversed(paths):
            found = gradients[path]
            layout = None if found is None else self._layout_of(path, tuple(found.shape), self.last)
            if found is not None and layout is not None and layout.fold(found).any():
                return self._read_by(path, paths)
        return paths[-1]

    def _read_by(self, path: str, paths: Sequence[str]) -> str:
        """The layer, or the input of a linear layer: an attention computes queries, keys and values from it."""
        source = self.outputs[path].source
        return source if isinstance(find_module(self.model, path), nn.Linear) and source in paths else path


def _error(found: LayerOutput, maps: Mapping[str, tuple[int, int] | None], *, map_shaped: bool) -> LayerError:
    """The error for a layer without a spatial size; one that is `map_shaped` has a shape that could have one."""
    size = " x ".join(map(str, found.shape[2:])) if len(found.shape) == 4 else f"its output is {found.shape}"
    why = "; a changed quarter of the image does not change that quarter of it most" if map_shaped else ""
    last, cells = next(((path, own) for path, own in reversed(list(maps.items())) if own), ("", None))
    where = (
        f": the last layer that has one is {last!r} ({cells[0]} x {cells[1]})" if cells else ", nor has any other layer"
    )
    return LayerError(f"layer {found.path!r} has no spatial size ({size}{why}){where}")
