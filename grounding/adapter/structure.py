"""Structure of a model as data: attention stacks, the path from the score to the patches, layer names, pooling."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from grounding.adapter.recorder import find_module
from grounding.core.errors import LayerError, ModelError

POOLINGS = ("cls", "mean", "attention_pool", "tokens", "sequence", "none")
# The stack that a layer given as a number belongs to, if the model has it.
USUAL_STACK = "vision"


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

    Parameters
    ----------
    blocks: the blocks.
    inputs: the modules whose output is the input of each block's attention (its first layer norm).
    attention: the modules that compute the attention weights (B, H, Q, S); empty if they cannot be recorded.
    items: what the leading axis of its outputs counts: images, or text sequences.
    rows_read_alone: in the last block a score reads some positions, each of which depends on its own attention row
        alone; targets at different positions then share a backward pass.
    """

    blocks: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    items: Literal["image", "sequence"] = "image"
    rows_read_alone: bool = False


@dataclass(frozen=True)
class Hop:
    """One step on the path from the score back to the patches, through the attention of one stack.

    Parameters
    ----------
    stack: name of the stack.
    kind: `self`, attention among the tokens of a sequence; `cross`, attention from text positions to image tokens;
        `pool`, attention of one learned query to the image tokens (an attention pooling head).
    among: of a `cross` hop, the stack of self-attention among its text positions, block by block; "" if there is none.
    keys: of a `cross` or `pool` hop, path of the module whose output tokens are the keys.
    live: the last block in which the rows where chains start have a gradient.
    """

    stack: str
    kind: Literal["self", "cross", "pool"] = "self"
    among: str = ""
    keys: str = ""
    live: int = -1

    def __post_init__(self) -> None:
        if self.kind != "self" and not self.keys:
            raise ModelError(f"hop {self.stack!r} of kind {self.kind} must name the module whose tokens are its keys")


@dataclass(frozen=True)
class ModelStructure:
    """Structure of one model for one kind of target.

    Parameters
    ----------
    stacks: name -> stack. Names are free; they appear in layer names ("decoder:-1") and in messages.
    default_layer: the layer of class activation maps: one on whose patches the score depends.
    pooling: how the output of the vision side is read: `cls`, `mean`, `attention_pool` (a hop of kind `pool`),
        `tokens` (by other weights, see `Adapter.pooling_weights`), `sequence` (by text positions), `none` (unknown).
    path: the hops that attention rollout and relevance follow, from the score to the patches; empty if no attention
        leads there.
    prefix: number of tokens before the patches (CLS, registers) in layers of tokens.
    sequence_side: module paths of the parts that run on text sequences, the same for all kinds of targets.
    pyramid: layers may have other patch grids than `default_layer` (convolutions, merged patches); the geometry of a
        view has the grid of `default_layer`.
    unrecorded: why attention is missing: a stack has blocks but no `attention`, or `path` is empty.
    live_layer: a layer that error messages recommend; "": the default layer.

    Raises ModelError for an unknown pooling or a hop through a stack that does not exist.
    """

    stacks: Mapping[str, Stack]
    default_layer: str
    pooling: str
    path: tuple[Hop, ...] = ()
    prefix: int = 0
    sequence_side: tuple[str, ...] = ()
    pyramid: bool = False
    unrecorded: str = ""
    live_layer: str = ""

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ModelError(f"unknown pooling {self.pooling!r} (known: {', '.join(POOLINGS)})")
        for name in (name for hop in self.path for name in (hop.stack, hop.among) if name):
            if name not in self.stacks:
                raise ModelError(f"the path goes through a stack {name!r} (there are: {', '.join(self.stacks)})")

    def stack(self, name: str) -> Stack:
        """Return the stack of a name. Raises LayerError listing the stacks."""
        if name not in self.stacks:
            raise LayerError(f"the model has no stack {name!r} (it has: {', '.join(self.stacks)})")
        return self.stacks[name]

    def items(self, path: str) -> Literal["image", "sequence"]:
        """Return what the leading axis of a module's output counts: images, or text sequences."""
        sequence = (block for stack in self.stacks.values() if stack.items == "sequence" for block in stack.blocks)
        inside = any(f"{path}.".startswith(f"{part}.") for part in (*self.sequence_side, *sequence))
        return "sequence" if inside else "image"

    @property
    def reads_sequence(self) -> bool:
        """Whether attention on the path depends on the text."""
        return any(self.stacks[hop.stack].items == "sequence" for hop in self.path)

    def keys(self, hop: Hop) -> str:
        """Return the path of a module whose output has the tokens that a hop leads to."""
        return hop.keys or self.stacks[hop.stack].blocks[0]

    def find_layer(self, model: nn.Module, layer: str | None) -> str:
        """Return the module path of a layer name.

        None is the default layer, `-1` the output of that block of the vision stack, `-1.in` the input of its
        attention, `fusion:-1.in` that in another stack; any other name is a dotted module path. Raises LayerError.
        """
        if layer is None:
            return self.default_layer
        name, _, rest = layer.rpartition(":")
        index, _, part = rest.partition(".")
        if not re.fullmatch(r"-?\d+", index) or part not in ("", "in"):
            find_module(model, layer)
            return layer
        name = name or self._usual_stack
        stack = self.stack(name)
        paths = stack.inputs if part else stack.blocks
        if not -len(paths) <= int(index) < len(paths):
            raise LayerError(
                f"layer {layer!r}: the {name} stack has {len(paths)} blocks, {-len(paths)} to {len(paths) - 1}"
            )
        return paths[int(index)]

    def aliases(self) -> dict[str, str]:
        """Return module path -> short name, as accepted by `find_layer`."""
        found: dict[str, str] = {}
        for name, stack in self.stacks.items():
            prefix = "" if name == self._usual_stack else f"{name}:"
            for paths, part in ((stack.blocks, ""), (stack.inputs, ".in")):
                found |= {path: f"{prefix}{i}{part}" for i, path in enumerate(paths)}
        return found

    @property
    def _usual_stack(self) -> str:
        return USUAL_STACK if USUAL_STACK in self.stacks else next(iter(self.stacks), "")


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
