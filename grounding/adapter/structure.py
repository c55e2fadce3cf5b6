"""Where things are in a model: stacks and layers by name, the patch grid in a layer's output, the read-out."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grounding.adapter.inputs import Sites, Stack
from grounding.adapter.patch_layout import Layout, find_layout
from grounding.adapter.recorder import find_module
from grounding.core.errors import LayerError, ModelError
from grounding.methods.chains import through

if TYPE_CHECKING:
    from grounding.methods.trace import Trace


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from, for provenance."""

    id: str
    type: str
    revision: str | None = None
    processor: Mapping[str, Any] = field(default_factory=dict)


class Places(ABC):
    """The half of an adapter that finds its way by `sites`."""

    model: nn.Module
    info: ModelInfo

    @cached_property
    @abstractmethod
    def sites(self) -> Sites:
        """Where things are in this model."""

    @property
    def device(self) -> torch.device:
        """Where the model is. Raises ModelError where some of it lies nowhere (offloaded to disk, meta device)."""
        found = list(dict.fromkeys(parameter.device for parameter in self.model.parameters()))
        if any(device.type == "meta" for device in found):
            raise ModelError("some weights are on the meta device (offloaded?): load the whole model onto one device")
        return found[0] if found else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The precision the model computes in."""
        return next((parameter.dtype for parameter in self.model.parameters()), torch.float32)

    def sequence(self, path: str) -> tuple[int, bool]:
        """In the output of a module: how many tokens stand before the patches, and whether others stand behind."""
        del path
        return self.sites.prefix, False

    def to_grid(
        self, hidden: Float[Tensor, "..."], grid: tuple[int, int], path: str = ""
    ) -> Float[Tensor, "B rows columns D"]:
        """Drop what is no patch of the output of the module at `path` (default: of the vision stack), check the count,
        fold. Also takes the (B, D, rows, columns) of a convolution.

        `grid` is that of the default tap; in a pyramid (see `Sites`) a layer's own may be another. Raises LayerError
        with the numbers where the tokens are not prefix + rows x columns.
        """
        return self.layout(hidden, grid, path).fold(hidden)

    def layout(self, hidden: Float[Tensor, "..."], grid: tuple[int, int], path: str = "") -> Layout:
        """How the patches lie in the output of the module at `path`. Raises LayerError as `to_grid`."""
        prefix, tail = self.sequence(path)
        pyramid = self.sites.pyramid
        found = find_layout(tuple(hidden.shape), grid, prefix, tail=tail, pyramid=pyramid)
        if found is not None:
            return found
        rows, columns = grid
        if pyramid and not prefix:
            expected = (
                f"maps over the whole picture, as the {rows} x {columns} of {self.sites.tap!r}, and more than 1 x 1"
            )
        else:
            expected = (
                f"{prefix} prefix tokens + {rows} x {columns} patches = {prefix + rows * columns} tokens"
                f"{' and a text' if tail else ''}"
            )
        raise LayerError(f"a layer output of shape {tuple(hidden.shape)} is no patch grid: expected {expected}")

    def text_rows(self, trace: Trace) -> Float[Tensor, "K Q"]:
        """From which places of the text side's sequence chains of attention start; default: where targets are read."""
        assert trace.targets.rows is not None
        return trace.targets.rows

    def readout_row(self, trace: Trace) -> Float[Tensor, "K N"]:
        """How much each token of the vision stack's output is read, per target: where attention chains start."""
        row = torch.zeros(len(trace.targets), trace.tokens, dtype=torch.float32, device=self.device)
        if self.sites.readout == "cls":
            row[:, 0] = 1
        elif self.sites.readout == "mean":
            row[:, self.sites.prefix :] = 1 / (trace.tokens - self.sites.prefix)
        elif self.sites.readout == "cross":
            [weights] = trace.attentions("cross", slice(-1, None))
            return trace.chain(trace.text_rows(), weights.mean(1), "cross")
        elif self.sites.readout == "fusion":
            row = trace.text_rows()
            for weights in reversed(trace.attentions("fusion")):
                row = through(trace, row, weights.mean(1), "fusion")
            return trace.picture_part(row)
        else:
            raise ModelError(f"{type(self).__name__} has read-out {self.sites.readout!r} and must answer readout_row")
        return row

    # ------------------------------------------------------------------ layers by name

    def stack(self, name: str) -> Stack:
        """The stack of that name. Raises LayerError naming those there are."""
        if name not in self.sites.stacks:
            raise LayerError(f"{self.info.type} has no stack {name!r} (it has: {', '.join(self.sites.stacks)})")
        return self.sites.stacks[name]

    def axis(self, path: str) -> str:
        """What the output of a module has first: "picture" or "text"."""
        inside = any(f"{path}.".startswith(f"{part}.") for part in self.sites.text_side)
        return "text" if inside else "picture"

    def resolve(self, layer: str | None) -> str:
        """The module path of a layer as a user names it.

        `None`: the default tap. `-1`: the output of that block of the vision stack; `-1.in`: the input of its
        attention; `fusion:-1.in`: in another stack; anything else: a dotted module path. Raises LayerError.
        """
        if layer is None:
            return self.sites.tap
        name, _, rest = layer.rpartition(":")
        index, _, part = rest.partition(".")
        if not re.fullmatch(r"-?\d+", index) or part not in ("", "in"):
            find_module(self.model, layer)
            return layer
        stack = self.stack(name or "vision")
        paths = stack.inputs if part else stack.blocks
        if not -len(paths) <= int(index) < len(paths):
            raise LayerError(
                f"layer {layer!r}: the {name or 'vision'} stack has {len(paths)} blocks, "
                f"{-len(paths)} to {len(paths) - 1}"
            )
        return paths[int(index)]
