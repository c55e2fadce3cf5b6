"""Structure of a model as data: attention stacks, layer names, pooling, and where the model came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from grounding.adapter.recorder import find_module
from grounding.core.errors import LayerError


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from, for provenance."""

    id: str
    type: str
    revision: str | None = None
    processor: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stack:
    """One run of attention blocks, as module paths in the model, first to last.

    `blocks` are the blocks themselves, `inputs` the modules whose output enters each block's attention (its first
    layer norm), `attention` the modules that compute the attention weights (H, Q, S).
    """

    blocks: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelStructure:
    """Where things are in one architecture, as data.

    Stacks have the same names everywhere: `vision` (the picture's own), `cross` (from text positions to the vision
    stack's output), `decoder` (among text positions), `fusion` (picture and text in one sequence), `text`. `tap` is the
    default layer for Grad-CAM: a live one. `pooling` says how the vision stack is read: `cls`, `mean`,
    `attention_pool`, `cross` (by the `cross` stack) or `fusion` (its tokens go on in that stack). `prefix` counts the
    tokens before the patches (CLS, registers). With `pyramid`, layers may have grids of their own (convolutions, merged
    patches); the inputs' geometry has that of `tap`. `unrecorded`: why a stack has blocks but no `attention` that could
    be recorded. `text_stacks` are the stacks whose attention rows see the text,
    `text_side` the parts of the model (module paths) that run on texts: their outputs have a text's sequence first,
    those of all others a picture.
    """

    stacks: Mapping[str, Stack]
    layer: str
    pooling: str
    prefix: int
    text_stacks: frozenset[str] = frozenset()
    text_side: tuple[str, ...] = ()
    pyramid: bool = False
    unrecorded: str = ""

    def stack(self, name: str) -> Stack:
        """The stack of that name. Raises LayerError naming those there are."""
        if name not in self.stacks:
            raise LayerError(f"the model has no stack {name!r} (it has: {', '.join(self.stacks)})")
        return self.stacks[name]

    def axis(self, path: str) -> Literal["image", "text"]:
        """What the leading axis of the output of the module at `path` counts: images, or the sequences of texts."""
        inside = any(f"{path}.".startswith(f"{part}.") for part in self.text_side)
        return "text" if inside else "image"

    def find_layer(self, model: nn.Module, layer: str | None) -> str:
        """The module path of a layer as a user names it.

        `None`: the default layer. `-1`: the output of that block of the vision stack; `-1.in`: the input of its
        attention; `fusion:-1.in`: in another stack; anything else: a dotted module path. Raises LayerError.
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
        """Module path -> short name, as `find_layer` takes it."""
        found: dict[str, str] = {}
        for name, stack in self.stacks.items():
            prefix = "" if name == "vision" else f"{name}:"
            for paths, part in ((stack.blocks, ""), (stack.inputs, ".in")):
                found |= {path: f"{prefix}{i}{part}" for i, path in enumerate(paths)}
        return found

    def attention(self, stack: str) -> tuple[str, ...]:
        """The attention modules of a stack, none where there is no such stack."""
        return self.stacks[stack].attention if stack in self.stacks else ()


@dataclass(frozen=True)
class Layer:
    """A layer whose output is a patch grid. `alias`: its short name; `live`: the score depends on its patches."""

    path: str
    shape: tuple[int, ...]
    live: bool
    default: bool
    alias: str = ""
