"""What an architecture must answer, and what it inherits.

An adapter is made around a model and its processor; it never changes either. To add an architecture, subclass
`Adapter`, answer the abstract methods, give `sites` and `kinds`, and add one line to the table in
`adapters/_table.py` (or an entry point `grounding.adapters` in a package of your own). Requirements:

1. `forward` computes all K scores in ONE pass over the B pictures, differentiable from every tap to every score,
   and pictures do not influence each other (no batch statistics): one backward serves one target per picture.
2. With `targets=None` it runs the vision stack alone and returns None.
3. `see` gives every picture its own `Geometry`, grid included; `read` never cuts a text in silence.
4. `targets` scores a span of a text as `kind` and `token_target` say, or raises TargetError naming what there is.
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
from grounding.recorder import Recorder, find_module
from grounding.registry import did_you_mean
from grounding.text import Span
from grounding.types import Inputs, Sites, Targets

if TYPE_CHECKING:
    from grounding.trace import Trace

TOKEN_TARGETS = ("leave-one-out", "alone")


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from, for provenance."""

    id: str
    type: str
    revision: str | None = None
    processor: Mapping[str, Any] = field(default_factory=dict)


class Adapter(ABC):
    """Base of all adapters. `kinds` are the targets the architecture has, its default first."""

    kinds: ClassVar[tuple[str, ...]]
    token_targets: ClassVar[tuple[str, ...]] = TOKEN_TARGETS
    # Target kinds that `score_from` recomputes from a fast tap.
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
    def read(self, inputs: Inputs, texts: Sequence[Sequence[str]]) -> Inputs:
        """The inputs with the texts of each picture added (`texts[b]`: any number, any length)."""

    @abstractmethod
    def targets(
        self,
        inputs: Inputs,
        spans: Sequence[Sequence[Span]],
        kind: str | None = None,
        token_target: str = TOKEN_TARGETS[0],
    ) -> Targets:
        """Flat targets for `spans[t]` of every text t, text by text in order.

        Raises TargetError for a kind or token target this architecture does not have.
        """

    @abstractmethod
    def forward(self, inputs: Inputs, targets: Targets | None) -> Float[Tensor, "K"] | None:
        """The scores (K,), differentiable, in one pass; without targets the vision stack alone runs."""

    @classmethod
    def from_checkpoint(cls, source: Any) -> Adapter:
        """The adapter of a checkpoint, for `adapters.load`: `source` has `model(class)`, `tokenizer()`,
        `image_processor()` and `info(model, image_processor)`. Not needed for models that are handed over."""
        raise ModelError(f"{cls.__name__} cannot load {source.id!r} by name: make it around a model")

    # ------------------------------------------------------------------ what every architecture inherits

    def prepare(self, images: Sequence[Any], texts: Sequence[Sequence[str]]) -> Inputs:
        """Pictures and the texts of each."""
        return self.read(self.see(images), texts)

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
            self.forward(inputs, None)
            recorder.check()
        return self.to_grid(recorder.outputs[path], self.grid(inputs))

    def attentions(self, inputs: Inputs, stack: str = "vision") -> list[Float[Tensor, "B H Q S"]]:
        """Attention weights of a stack, first block to last, whatever implementation the model was loaded with."""
        paths = self.stack(stack).attention
        with Recorder(self.model, attention=dict.fromkeys(paths, False)) as recorder:
            self.forward(inputs, None)
            recorder.check()
        return [recorder.weights[path] for path in paths]

    def scores(self, inputs: Inputs, targets: Targets) -> Float[Tensor, "K"]:
        """The targets' values."""
        with Recorder(self.model):
            scores = self.forward(inputs, targets)
        assert scores is not None
        return scores

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
        else:
            raise ModelError(f"{type(self).__name__} has read-out {self.sites.readout!r} and must answer readout_row")
        return row

    def text_conditioned(self, kind: str, gradient: bool) -> bool:
        """Whether a map of a target kind depends on the text: by gradient, or through a stack that sees the text."""
        return kind != "norm" and (gradient or bool(self.sites.text_stacks))

    @property
    def fast_taps(self) -> Mapping[str, tuple[str, ...]]:
        """Tap -> paths of the other modules whose outputs an overriding `score_from` reads; none by default."""
        return {}

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
        inputs = self.one_picture_per_target(inputs, targets)
        targets = Targets(
            targets.kind, torch.arange(len(targets)), targets.text, targets.spans, targets.data, targets.token_target
        )
        module = find_module(self.model, tap)
        grid = self.grid(inputs)

        def shifted(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            self.to_grid(hidden, grid)  # the check
            if hidden.ndim == 4:
                hidden = hidden + shift[:, :, None, None]
            else:
                patches = torch.arange(hidden.shape[1], device=hidden.device) >= self.sites.prefix
                hidden = hidden + patches[None, :, None] * shift[:, None, :]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        with Recorder(self.model, rule=rule):
            handle = module.register_forward_hook(shifted)
            try:
                with torch.enable_grad():
                    scores = self.forward(inputs, targets)
            finally:
                handle.remove()
        assert scores is not None
        return scores

    def one_picture_per_target(self, inputs: Inputs, targets: Targets) -> Inputs:
        """Inputs whose k-th picture is the picture of target k; texts as they are."""
        index = targets.image.tolist()
        tensors = dict(inputs.tensors)
        tensors |= {name: tensors[name][index] for name in inputs.per_picture}
        return Inputs(
            pictures=tuple(inputs.pictures[b] for b in index),
            geometry=tuple(inputs.geometry[b] for b in index),
            tokens=inputs.tokens,
            text_image=inputs.text_image,
            tensors=tensors,
            per_picture=inputs.per_picture,
        )

    def check_kind(self, kind: str | None, token_target: str) -> str:
        """The target kind to use (None: the default). Raises TargetError naming what this architecture has."""
        kind = kind or self.kinds[0]
        for what, asked, known in (("target", kind, self.kinds), ("token target", token_target, self.token_targets)):
            if asked not in known:
                raise TargetError(
                    f"{self.info.type} has no {what} {asked!r}{did_you_mean(asked, list(known))} "
                    f"(it has: {', '.join(known)})"
                )
        return kind

    # ------------------------------------------------------------------ layers by name

    def stack(self, name: str) -> Any:
        """The stack of that name. Raises LayerError naming those there are."""
        if name not in self.sites.stacks:
            raise LayerError(f"{self.info.type} has no stack {name!r} (it has: {', '.join(self.sites.stacks)})")
        return self.sites.stacks[name]

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
