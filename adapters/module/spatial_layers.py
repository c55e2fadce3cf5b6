"""Layers with a spatial size, found by running a model and not by believing its names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from adapters.module.spatial_response import BEYOND_DOUBT, FEW, is_spatial, spatial_response
from adapters.shared.layer_outputs import LayerOutput, record_outputs
from grounding.adapter.patch_layout import TOKENS, Layout, find_layout
from grounding.adapter.recorder import Recorder, find_module
from grounding.core.errors import LayerError, ModelError

# More tokens before the patches than any known transformer has (CLS and registers): then it is no run of patches.
MOST_PREFIX = 16
# They give the same grid whatever the picture's shape.
ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class SpatialLayers:
    """The layers of a module whose cells lie as the picture does: maps, and tokens of which there are as many as cells
    of the last map (or 4, 16, ... times as many, before they are merged).

    `run` makes scores (1, classes) of a picture as the model takes it, such as `sample`; `name` is the model in words;
    `prefix` is how many tokens stand before the patches, None: all that are over.
    Raises LayerError where there is no map, ModelError where no layer has `prefix` tokens over.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[Tensor], Tensor], sample: Tensor, name: str, prefix: int | None
    ) -> None:
        self.model, self.run, self.name, self._prefix = model, run, name, prefix
        self.size = (int(sample.shape[-2]), int(sample.shape[-1]))
        scores: list[Tensor] = []
        self.ran = {one.path: one for one in record_outputs(model, lambda: scores.append(run(sample.clone())))}
        self.scores = int(scores[0].shape[-1])
        layouts = {path: one.layout(self.size) for path, one in self.ran.items()}
        could = {path: layout for path, layout in layouts.items() if layout or self.ran[path].tokens}
        self._changes = spatial_response(model, run, sample, could)
        if not self.maps:
            raise LayerError(f"{name} has no layer with a spatial size at {self.size[1]} x {self.size[0]}")
        self.last_map, self.last = list(self.maps.items())[-1]
        self.over = self._over()
        self.before = self.over if prefix is None else prefix
        sure = frozenset(path for path, over in self._counts.items() if over == self.over) | self._finer()
        self.tokens = sure | (self._like_them() if sure else frozenset())
        self.paths = tuple(path for path in self.ran if path in self.maps or path in self.tokens)
        self.last_live = self._last_live(sample, [path for path in self.paths if path in self.maps or path in sure])

    @cached_property
    def maps(self) -> dict[str, tuple[int, int]]:
        """Path -> (rows, columns) of the layers that give maps of the picture, of more than one cell."""
        adaptive = {path for path, module in self.model.named_modules() if isinstance(module, ADAPTIVE)}
        found = {path: one.cells(self.size) for path, one in self.ran.items() if path not in adaptive}
        return {
            path: cells
            for path, cells in found.items()
            if cells and path in self._changes and self._is_map(path, cells)
        }

    def _is_map(self, path: str, cells: tuple[int, int]) -> bool:
        """Whether cells change with the picture, and lie as it does where they might be attention weights between the
        tokens that the model has. Of what convolutions give little can be told: a cell may see all of the picture."""
        weights = cells[0] == cells[1] and cells[0] in self._tokens
        return is_spatial(self._changes[path], BEYOND_DOUBT) if weights else bool(self._changes[path].any())

    @cached_property
    def _tokens(self) -> frozenset[int]:
        """How many tokens may attend to each other: those of a layer, or the cells of one with some before them."""
        cells = {prod(own) for one in self.ran.values() if (own := one.cells(self.size))}
        before = {count + over for count in cells for over in range(MOST_PREFIX + 1) if count >= FEW}
        return frozenset(before | {one.tokens for one in self.ran.values() if one.tokens >= FEW})

    @property
    def flats(self) -> frozenset[str]:
        """The layers that ran and have no place on the picture."""
        return frozenset(self.ran) - frozenset(self.paths)

    @property
    def strays(self) -> frozenset[str]:
        """Those of them that by their shape might have one."""
        return self.flats.intersection(self._changes)

    def sequence(self, path: str) -> tuple[int, bool]:
        """Tokens before the patches in a layer, and whether others stand behind them."""
        tail = self.over > self.before and path in self.tokens
        return self.before, tail and self.ran[path].tokens == prod(self.last) + self.over

    def grid(self, path: str, blank: Tensor) -> tuple[int, int]:
        """(rows, columns) of a layer for a picture of the size of `blank`. Raises LayerError."""
        height, width = (int(side) for side in blank.shape[-2:])
        with Recorder(self.model, dict.fromkeys((path, self.last_map), False)) as recorder:
            self.run(blank.clone())
            recorder.check()
        shapes = {own: tuple(output.shape) for own, output in recorder.outputs.items()}
        cells = LayerOutput(self.last_map, shapes[self.last_map]).cells((height, width))
        if len(shapes[path]) == 4:
            cells = LayerOutput(path, shapes[path]).cells((height, width))
        elif cells:
            found = self._run_of(path, shapes[path], cells)
            cells = (found.rows, found.columns) if found else None
        if cells:
            return cells
        ran = record_outputs(self.model, lambda: self.run(blank.clone()))
        maps = {one.path: one.cells((height, width)) for one in ran if one.path in self.maps}
        raise _flat(LayerOutput(path, shapes[path]), maps, strays=False)

    def flat(self, path: str) -> LayerError:
        """What to say of a layer that has no place on the picture."""
        layout = self._run_of(self.last_live, self.ran[self.last_live].shape, self.last)
        last = {self.last_live: (layout.rows, layout.columns) if layout else None}
        return _flat(self.ran[path], last, strays=path in self.strays)

    def _over(self) -> int:
        """How many tokens the last layer of tokens has over."""
        counts = list(self._counts.values())
        if not counts and self._prefix:
            raise ModelError(
                f"prefix={self._prefix}, but no layer of {self.name} has {self._prefix} or more tokens over the "
                f"{self.last[0]} x {self.last[1]} cells of layer {self.last_map!r}"
            )
        return counts[-1] if counts else 0

    @cached_property
    def _counts(self) -> dict[str, int]:
        """How many tokens the layers have over that give one for each cell of the last map, row by row."""
        count, least = prod(self.last), self._prefix or 0
        over = {path: one.tokens - count for path, one in self.ran.items() if one.tokens and path in self._changes}
        over = {path: number for path, number in over.items() if least <= number <= max(MOST_PREFIX, least)}
        before = {path: number if self._prefix is None else self._prefix for path, number in over.items()}
        return {
            path: number
            for path, number in over.items()
            if self._by_rows(path, Layout(TOKENS, *self.last, before[path]))
        }

    def _finer(self) -> frozenset[str]:
        """Layers of tokens before they were merged."""
        others = [path for path in self._changes if self.ran[path].tokens and path not in self._counts]
        layouts = {path: find_layout(self.ran[path].shape, self.last, self.before, pyramid=True) for path in others}
        return frozenset(path for path, layout in layouts.items() if layout and self._by_rows(path, layout))

    def _like_them(self) -> frozenset[str]:
        """Layers that mix tokens so much that their order cannot be told, with as many as others that have one."""
        count = prod(self.last) + self.over
        return frozenset(path for path in self._changes if self.ran[path].tokens == count and self._changes[path].any())

    def _by_rows(self, path: str, layout: Layout) -> bool:
        """Whether tokens go row by row over the picture."""
        count = layout.rows * layout.columns
        patches = self._changes[path][:, layout.prefix : layout.prefix + count]
        return is_spatial(patches.reshape(-1, layout.rows, layout.columns))

    def _run_of(self, path: str, shape: tuple[int, ...], last: tuple[int, int]) -> Layout | None:
        """The layout of an output, tokens or maps, where the last map has these cells."""
        before, tail = self.sequence(path)
        return find_layout(shape, last, before, tail=tail, pyramid=True)

    def _last_live(self, sample: Tensor, paths: Sequence[str]) -> str:
        """The last layer whose patches the scores depend on: behind it only a class token is read."""
        waves = torch.arange(sample.numel(), device=sample.device).sin().reshape(sample.shape).to(sample.dtype)
        with Recorder(self.model, dict.fromkeys(paths, True)) as recorder:
            total = self.run(waves).sum()
        if not total.requires_grad:
            raise ModelError(
                f"no gradient passes {self.name}: its forward runs under torch.no_grad, or its scores are detached "
                "from what the layers give"
            )
        outputs = [recorder.outputs[path] for path in paths]
        gradients = dict(zip(paths, torch.autograd.grad(total, outputs, allow_unused=True), strict=True))
        for path in reversed(paths):
            found = gradients[path]
            layout = None if found is None else self._run_of(path, tuple(found.shape), self.last)
            if found is not None and layout is not None and layout.fold(found).any():
                return self._read_by(path, paths)
        return paths[-1]

    def _read_by(self, path: str, paths: Sequence[str]) -> str:
        """The layer that a linear map reads: in an attention queries, keys and values are all made of it."""
        source = self.ran[path].source
        return source if isinstance(find_module(self.model, path), nn.Linear) and source in paths else path


def _flat(found: LayerOutput, maps: Mapping[str, tuple[int, int] | None], *, strays: bool) -> LayerError:
    """What to say of a tap without a spatial size; one that `strays` could have one by its shape."""
    size = " x ".join(map(str, found.shape[2:])) if len(found.shape) == 4 else f"its output is {found.shape}"
    why = "; a changed quarter of the picture does not change that quarter of it most" if strays else ""
    last, cells = next(((path, own) for path, own in reversed(list(maps.items())) if own), ("", None))
    where = (
        f": the last layer that has one is {last!r} ({cells[0]} x {cells[1]})" if cells else ", nor has any other layer"
    )
    return LayerError(f"layer {found.path!r} has no spatial size ({size}{why}){where}")
