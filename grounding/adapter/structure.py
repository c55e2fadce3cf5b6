"""Structure of a model as data: attention stacks, layer names and pooling; origin of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from grounding.adapter.recorder import find_module
from grounding.core.errors import LayerError, ModelError
from grounding.core.registry import did_you_mean

# Names of stacks: those that methods read, and the top-level modules of any other model.
STACKS = ("vision", "cross", "decoder", "fusion", "text", "children")


@dataclass(frozen=True)
class ModelInfo:
    """Origin of a model, for provenance.

    `id` is a Hugging Face id or a path, `type` the model type in messages, `processor` the settings of its
    image processor.
    """

    id: str
    type: str
    revision: str | None = None
    processor: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stack:
    """A sequence of attention blocks, as module paths in the model, first to last.

    `blocks` are the blocks, `inputs` the modules whose output is the input of each block's attention (its first layer
    norm), `attention` the modules that compute the attention weights (B, H, Q, S).
    """

    blocks: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelStructure:
    """Structure of one model: its attention stacks, default layer, pooling and text side.

    Parameters
    ----------
    stacks: name -> stack. Names are the same for all architectures: `vision` (image tokens), `cross` (from text
        positions to the vision stack's output), `decoder` (among text positions), `fusion` (image and text tokens in
        one sequence), `text` (text encoder).
    layer: the default layer of class activation maps: one on whose patches the score depends.
    pooling: how the output of the vision stack is read: `cls`, `mean`, `attention_pool`, `cross` (by that stack) or
        `fusion` (its tokens continue in that stack).
    prefix: number of tokens before the patches (CLS, registers).
    text_stacks: stacks whose attention weights depend on the text.
    text_side: module paths of the parts that run on texts. The leading axis of their outputs counts text sequences,
        that of all other modules images.
    pyramid: layers may have other patch grids than `layer` (convolutions, merged patches); the geometry of `Inputs` has
        the grid of `layer`.
    unrecorded: why a stack has blocks but no `attention` that can be recorded.
    """

    stacks: Mapping[str, Stack]
    layer: str
    pooling: str
    prefix: int
    text_stacks: frozenset[str] = frozenset()
    text_side: tuple[str, ...] = ()
    pyramid: bool = False
    unrecorded: str = ""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.stacks if name not in STACKS]:
            raise ModelError(
                f"unknown stack {unknown[0]!r}{did_you_mean(unknown[0], list(STACKS))} (known: {', '.join(STACKS)})"
            )

    def stack(self, name: str) -> Stack:
        """Return the stack of a name. Raises LayerError listing the stacks."""
        if name not in self.stacks:
            raise LayerError(f"the model has no stack {name!r} (it has: {', '.join(self.stacks)})")
        return self.stacks[name]

    def axis(self, path: str) -> Literal["image", "text"]:
        """Return what the leading axis of a module's output counts: images, or text sequences."""
        inside = any(f"{path}.".startswith(f"{part}.") for part in self.text_side)
        return "text" if inside else "image"

    def find_layer(self, model: nn.Module, layer: str | None) -> str:
        """Return the module path of a layer name.

        None is the default layer, `-1` the output of that block of the vision stack, `-1.in` the input of its
        attention, `fusion:-1.in` that in another stack; any other name is a dotted module path. Raises LayerError.
        """
        if layer is None:
            return self.layer
        name, _, rest = layer.rpartition(":")
        index, _, part = rest.partition(".")
        if not re.fullmatch(r"-?\d+", index) or part not in ("", "in"):
            find_module(model, layer)
            return layer
        stack = self.stack(name or "vision")
        paths = stack.inputs if part else stack.blocks
        if not -len(paths) <= int(index) < len(paths):
            raise LayerError(
                f"layer {layer!r}: the {name or 'vision'} stack has {len(paths)} blocks, "
                f"{-len(paths)} to {len(paths) - 1}"
            )
        return paths[int(index)]

    def aliases(self) -> dict[str, str]:
        """Return module path -> short name, as accepted by `find_layer`."""
        found: dict[str, str] = {}
        for name, stack in self.stacks.items():
            prefix = "" if name == "vision" else f"{name}:"
            for paths, part in ((stack.blocks, ""), (stack.inputs, ".in")):
                found |= {path: f"{prefix}{i}{part}" for i, path in enumerate(paths)}
        return found

    def attention(self, stack: str) -> tuple[str, ...]:
        """Return the attention modules of a stack; empty if there is no such stack."""
        return self.stacks[stack].attention if stack in self.stacks else ()


@dataclass(frozen=True)
class Layer:
    """A layer whose output is a patch grid.

    `shape` is that of its output, `alias` its short name, `live` whether the score depends on its patches.
    """

    path: str
    shape: tuple[int, ...]
    live: bool
    default: bool
    alias: str = ""
