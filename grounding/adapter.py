"""What an architecture must answer, and what it inherits.

An adapter is made around a model and its processor; it never changes either. To add an architecture, subclass
`Adapter`, answer the abstract methods, give `sites` and `kinds`, and add one line to the table in
`adapters/_table.py` (or an entry point `grounding.adapters` in a package of your own). Requirements:

1. `encode` runs the vision stack over the B pictures, `score` goes on from there to all K scores; together they are ONE
   pass, differentiable from every tap to every score. Pictures do not influence each other (no batch statistics), nor
   do texts: one backward serves one target per picture.
2. `see` gives every picture its own `Geometry`, grid included; `read` never cuts a text in silence.
3. `targets` scores a span of a text as `kind` and `token_target` say, or raises TargetError naming what there is.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from grounding.errors import LayerError, ModelError, TargetError
from grounding.explanation import Alternative
from grounding.methods import DEFAULT_METHODS
from grounding.recorder import Recorder, find_module
from grounding.registry import did_you_mean
from grounding.repeating import shifted_scores
from grounding.text import Generate, Span
from grounding.types import Inputs, Sites, Stack, Targets

if TYPE_CHECKING:
    from grounding.trace import Trace

TOKEN_TARGETS = ("leave-one-out", "alone")
# The probability of a token at its place, and the next best ones.
Chance = tuple[float, tuple[Alternative, ...]]


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from, for provenance."""

    id: str
    type: str
    revision: str | None = None
    processor: Mapping[str, Any] = field(default_factory=dict)


class Adapter(ABC):
    """Base of all adapters. `kinds` are the targets the architecture has, its default first; `token_targets` how it
    scores a part of a caption, likewise (none: by itself)."""

    kinds: ClassVar[tuple[str, ...]]
    token_targets: ClassVar[tuple[str, ...]] = TOKEN_TARGETS
    default_methods: ClassVar[tuple[str, ...]] = DEFAULT_METHODS
    # Whether it can write a text itself: `read` then takes `Generate` in place of one.
    generates: ClassVar[bool] = False
    # What to say where a demo model gets a picture from outside, and the public checkpoint to use instead.
    demo_advice: ClassVar[str] = "this model knows only its demo world"
    example: ClassVar[str] = ""
    # Target kinds that `shifts` knows at a fast tap.
    fast_kinds: ClassVar[tuple[str, ...]] = ()
    model: nn.Module
    info: ModelInfo

    # ------------------------------------------------------------------ what an architecture answers

    @cached_property
    @abstractmethod
    def sites(self) -> Sites:
        """Where things are in this model."""

    @abstractmethod
    def see(self, images: Sequence[Any]) -> Inputs:
        """Inputs of pictures (anything `open_image` takes), without texts. `explain` takes the result in place of the
        pictures, and then runs the picture tower once for all texts that it is called with."""

    @abstractmethod
    def read(self, inputs: Inputs, texts: Sequence[Sequence[str | Generate]]) -> Inputs:
        """The inputs with the texts of each picture added (`texts[b]`: any number, any length)."""

    @abstractmethod
    def targets(
        self,
        inputs: Inputs,
        spans: Sequence[Sequence[Span]],
        kind: str | None = None,
        token_target: str | None = None,
    ) -> Targets:
        """Flat targets for `spans[t]` of every text t, text by text in order; None: the architecture's default.

        Raises TargetError for a kind or token target this architecture does not have.
        """

    @abstractmethod
    def encode(self, inputs: Inputs) -> Float[Tensor, "B ..."]:
        """The vision stack's output as the text side reads it, differentiable."""

    @abstractmethod
    def score(self, inputs: Inputs, encoded: Float[Tensor, "B ..."], targets: Targets) -> Float[Tensor, "K"]:
        """The scores (K,) from what `encode` gave, differentiable."""

    @classmethod
    def from_checkpoint(cls, source: Any) -> Adapter:
        """The adapter of a checkpoint, for `adapters.load`: `source` has `model(class)`, `tokenizer()`,
        `image_processor()` and `info(model, image_processor)`. Not needed for models that are handed over."""
        raise ModelError(f"{cls.__name__} cannot load {source.id!r} by name: make it around a model")

    # ------------------------------------------------------------------ what every architecture inherits

    def prepare(self, images: Sequence[Any], texts: Sequence[Sequence[str | Generate]]) -> Inputs:
        """Pictures and the texts of each."""
        return self.read(self.see(images), texts)

    def forward(self, inputs: Inputs, targets: Targets) -> Float[Tensor, "K"]:
        """The scores (K,), differentiable, in one pass."""
        return self.score(inputs, self.encode(inputs), targets)

    @property
    def device(self) -> torch.device:
        """Where the model is. Raises ModelError where some of it lies nowhere (offloaded to disk, meta device)."""
        found = {parameter.device for parameter in self.model.parameters()}
        if any(device.type == "meta" for device in found):
            raise ModelError("some weights are on the meta device (offloaded?): load the whole model onto one device")
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision the model computes in."""
        return next(self.model.parameters()).dtype

    def activations(self, inputs: Inputs, layer: str | None = None) -> Float[Tensor, "B rows columns D"]:
        """Patch features of a layer (default: the default tap), prefix tokens dropped."""
        path = self.resolve(layer)
        with Recorder(self.model, taps={path: False}) as recorder:
            self.encode(inputs)
            recorder.check()
        return self.to_grid(recorder.outputs[path], self.grid(inputs))

    def attentions(self, inputs: Inputs, stack: str = "vision") -> list[Float[Tensor, "B H Q S"]]:
        """Attention weights of a stack, first block to last, whatever implementation the model was loaded with.

        Those of a stack that sees the text have the texts first.
        """
        found = self.stack(stack)
        with Recorder(self.model, attention=dict.fromkeys(found.attention, False)) as recorder:
            encoded = self.encode(inputs)
            if found.axis == "text":
                self.score(inputs, encoded, self.targets(inputs, [[tokens.caption()] for tokens in inputs.tokens]))
            recorder.check()
        return [recorder.weights[path] for path in found.attention]

    def scores(self, inputs: Inputs, targets: Targets) -> Float[Tensor, "K"]:
        """The targets' values."""
        with Recorder(self.model):
            return self.forward(inputs, targets)

    def grid(self, inputs: Inputs) -> tuple[int, int]:
        """Rows and columns of the patch grid, the same for all pictures of a batch."""
        return inputs.geometry[0].rows, inputs.geometry[0].columns

    def to_grid(self, hidden: Float[Tensor, "..."], grid: tuple[int, int]) -> Float[Tensor, "B rows columns D"]:
        """Drop prefix tokens, check the count, fold. Also takes the (B, D, rows, columns) of a convolution.

        Raises LayerError with the numbers where the tokens are not prefix + rows x columns.
        """
        rows, columns = grid
        if hidden.ndim == 4 and tuple(hidden.shape[-2:]) == grid:
            return rearrange(hidden, "b d r c -> b r c d")
        if hidden.ndim == 3 and hidden.shape[1] == self.sites.prefix + rows * columns:
            return rearrange(hidden[:, self.sites.prefix :], "b (r c) d -> b r c d", r=rows)
        raise LayerError(
            f"a layer output of shape {tuple(hidden.shape)} is no patch grid: expected {self.sites.prefix} prefix "
            f"tokens + {rows} x {columns} patches = {self.sites.prefix + rows * columns} tokens"
        )

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
        else:
            raise ModelError(f"{type(self).__name__} has read-out {self.sites.readout!r} and must answer readout_row")
        return row

    def text_conditioned(self, kind: str, gradient: bool) -> bool:
        """Whether a map of a target kind depends on the text: by gradient, or through a stack that sees the text."""
        return kind != "norm" and (gradient or bool(self.sites.text_stacks))

    @property
    def fast_taps(self) -> Mapping[str, tuple[str, ...]]:
        """Tap -> paths of the other modules whose outputs an overriding `shifts` reads; none by default."""
        return {}

    def shifts(
        self,
        tap: str,
        inputs: Inputs,
        targets: Targets,
        outputs: Mapping[str, Tensor],
        rule: str | None = None,
    ) -> Float[Tensor, "K D"]:
        """d score / d (one vector added to all patches of a fast tap), per target: all that Grad-CAM needs.

        `outputs` are what the pass gave at the tap and the places that `fast_taps` names for it.
        """
        features = outputs[tap]
        zero = torch.zeros(len(targets), features.shape[-1], dtype=features.dtype, device=features.device)
        with torch.enable_grad():
            zero.requires_grad_()
            total = self.score_from(tap, inputs, targets, zero, outputs, rule).sum()
        [gradient] = torch.autograd.grad(total, zero)
        return gradient

    def from_tap(self, tap: str, features: Tensor) -> Tensor | None:  # noqa: ARG002
        """What `encode` gives where a fast tap gives `features`, if nothing but a LayerNorm lies between; else None."""
        return None

    def alternatives(self, inputs: Inputs, targets: Targets) -> Sequence[Chance | None]:  # noqa: ARG002
        """Per target the probability of the token it explains, and the next best; None where there is none."""
        return [None] * len(targets)

    def score_from(
        self,
        tap: str,
        inputs: Inputs,
        targets: Targets,
        shift: Float[Tensor, "K D"],
        outputs: Mapping[str, Tensor] | None = None,  # noqa: ARG002  (for fast overrides)
        rule: str | None = None,
    ) -> Float[Tensor, "K"]:
        """The scores with one shift vector per target added to all patches of the tap, differentiable in `shift`.

        Grad-CAM needs no more than d score / d shift at shift 0. This is the slow, right way: every target gets a
        picture of its own, the tap's output is shifted, everything is run. An architecture may override it with a fast
        one for the taps in `fast_taps`, which starts from the recorded `outputs` and need be right only to first order.
        `rule` is a backward rule as in `Recorder`.
        """
        return shifted_scores(self, tap, inputs, targets, shift, rule)

    def check_kind(self, kind: str | None, token_target: str | None = None) -> tuple[str, str | None]:
        """Target kind and token target to use (None: the default). Raises TargetError naming what there is."""
        kind, token_target = kind or self.kinds[0], token_target or next(iter(self.token_targets), None)
        for what, asked, known in (("target", kind, self.kinds), ("token target", token_target, self.token_targets)):
            if asked is not None and asked not in known:
                raise TargetError(
                    f"{self.info.type} has no {what} {asked!r}{did_you_mean(asked, list(known))} "
                    f"(it has: {', '.join(known) or 'none, a token is scored by itself'})"
                )
        return kind, token_target

    # ------------------------------------------------------------------ layers by name

    def stack(self, name: str) -> Stack:
        """The stack of that name. Raises LayerError naming those there are."""
        if name not in self.sites.stacks:
            raise LayerError(f"{self.info.type} has no stack {name!r} (it has: {', '.join(self.sites.stacks)})")
        return self.sites.stacks[name]

    def axis(self, path: str) -> str:
        """What the output of a module has first, "picture" or "text", by the stack it lies in."""
        inside = (s for s in self.sites.stacks.values() if any(f"{path}.".startswith(f"{b}.") for b in s.blocks))
        return "text" if any(stack.axis == "text" for stack in inside) else "picture"

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
