"""What an architecture must answer, and what it inherits.

An adapter is made around a model and its processor; it never changes either. To add an architecture, subclass
`Adapter`, answer the abstract methods, give `structure` and `kinds`, and add one line to the table in
`adapters/_table.py` (or an entry point `grounding.adapters` in a package of your own). Requirements:

1. `encode_images` runs the vision stack over the B pictures, `score` goes on from there to all K scores; together they are ONE
   pass, differentiable from every tap to every score. Pictures do not influence each other (no batch statistics), nor
   do texts: one backward serves one target per picture.
2. `prepare_images` gives every picture its own `Geometry`, grid included; `prepare_texts` never cuts a text in silence.
3. `targets` scores a span of a text as `kind` and `token_target` say, or raises TargetError naming what there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.patch_layout import Layout, find_layout
from grounding.adapter.recorder import Recorder, find_module
from grounding.adapter.replicate import one_image_per_target
from grounding.adapter.structure import ModelInfo, ModelStructure
from grounding.core.errors import LayerError, ModelError, OptionError, TargetError, TextError
from grounding.core.registry import did_you_mean
from grounding.core.text import Alternative, Asked, Generate, Span, check_text

__all__ = ["TOKEN_TARGETS", "Adapter", "ModelInfo", "TokenProbability"]

TOKEN_TARGETS = ("leave-one-out", "alone")
DEFAULT_METHODS = ("gradcam", "rollout", "relevance")
# The probability of a token at its place, and the next best ones.
TokenProbability = tuple[float, tuple[Alternative, ...]]


class Adapter(ABC):
    """Base of all adapters. `kinds` are the targets the architecture has, its default first; `token_targets` how it
    scores a part of a caption, likewise (none: by itself)."""

    model: nn.Module
    info: ModelInfo
    kinds: ClassVar[tuple[str, ...]]
    token_targets: ClassVar[tuple[str, ...]] = TOKEN_TARGETS
    default_methods: ClassVar[tuple[str, ...]] = DEFAULT_METHODS
    # Whether it can write a text itself: `prepare_texts` then takes `Generate` in place of one.
    generates: ClassVar[bool] = False
    # A text to try layers on, or what stands in its place.
    placeholder: ClassVar[Asked] = "picture"
    # What to say where a demo model gets a picture from outside, and the public checkpoint to use instead.
    demo_parts: ClassVar[tuple[str, ...]] = ("scenes", "default.jpg")
    demo_advice: ClassVar[str] = "this model knows only its demo world"
    example: ClassVar[str] = ""
    # Target kinds that `shifts` knows at a fast tap.
    fast_kinds: ClassVar[tuple[str, ...]] = ()

    # ------------------------------------------------------------------ what an architecture answers

    @property
    @abstractmethod
    def structure(self) -> ModelStructure:
        """The structure of this model."""

    @abstractmethod
    def prepare_images(self, images: Sequence[Any]) -> Inputs:
        """Inputs of pictures (anything `open_image` takes), without texts. `explain` takes the result in place of the
        pictures, and then runs the picture tower once for all texts that it is called with."""

    @abstractmethod
    def prepare_texts(self, inputs: Inputs, texts: Sequence[Sequence[Asked]]) -> Inputs:
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
    def encode_images(self, inputs: Inputs) -> Float[Tensor, "B ..."]:
        """The vision stack's output as the text side reads it, differentiable."""

    @abstractmethod
    def score(self, inputs: Inputs, encoded: Float[Tensor, "B ..."], targets: Targets) -> Float[Tensor, "K"]:
        """The scores (K,) from what `encode_images` gave, differentiable."""

    @classmethod
    def from_checkpoint(cls, source: Any) -> Adapter:
        """The adapter of a checkpoint, for `adapters.load`: `source` has `model(class)`, `tokenizer()`,
        `image_processor()` and `info(model, image_processor)`. Not needed for models that are handed over."""
        raise ModelError(f"{cls.__name__} cannot load {source.id!r} by name: make it around a model")

    # ------------------------------------------------------------------ what every architecture inherits

    def asked(self, text: Any) -> Asked:
        """What is asked of a picture, checked: a text; of a model that writes, also None or `Generate`. Raises
        TextError."""
        if self.generates and (text is None or isinstance(text, Generate)):
            return text or Generate()
        if text is None:
            raise TextError("nothing to ground: this model writes no text itself, give it one")
        return check_text(text)

    def asked_by(self, target: Any, texts: Any) -> tuple[str | None, Any]:
        """The kind of target, and the texts or what stands in their place. Raises TargetError."""
        if target is not None and not isinstance(target, str):
            raise TargetError(f"{self.info.type} has targets {', '.join(self.kinds)} and no classes, got {target!r}")
        return target, texts

    @property
    def needs_text(self) -> bool:
        """Whether there is nothing to explain where no text is given."""
        return not self.generates

    def looks_first(self, texts: Sequence[Sequence[Asked]]) -> bool:  # noqa: ARG002
        """Whether `prepare_texts` needs to know what the vision stack gave for these texts."""
        return self.generates

    def aimed(self, kind: str | None, options: Mapping[str, Any] | None = None) -> Adapter:
        """The adapter for targets of this kind (None: its default), where its sites depend on it; `options` are those
        of targets, "kind.option" -> value. Raises TargetError, OptionError."""
        self.check_kind(kind)
        for key in options or {}:
            raise OptionError(f"option {key!r}: targets of {self.info.type} have no options")
        return self

    def prepare(self, images: Sequence[Any], texts: Sequence[Sequence[Asked]]) -> Inputs:
        """Pictures and the texts of each."""
        return self.prepare_texts(self.prepare_images(images), texts)

    def forward(self, inputs: Inputs, targets: Targets) -> Float[Tensor, "K"]:
        """The scores (K,), differentiable, in one pass."""
        return self.score(inputs, self.encode_images(inputs), targets)

    @property
    def device(self) -> torch.device:
        """The device of the model. Raises ModelError where weights have none (offloaded to disk, meta device)."""
        found = list(dict.fromkeys(parameter.device for parameter in self.model.parameters()))
        if any(device.type == "meta" for device in found):
            raise ModelError("some weights are on the meta device (offloaded?): load the whole model onto one device")
        return found[0] if found else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The precision the model computes in."""
        return next((parameter.dtype for parameter in self.model.parameters()), torch.float32)

    def sequence(self, path: str) -> tuple[int, bool]:
        """Number of tokens before the patches in the output of a module, and whether other tokens follow them."""
        del path
        return self.structure.prefix, False

    def pooling_weights(self, count: int, tokens: int) -> Float[Tensor, "K N"] | None:
        """Weight of each of the `tokens` of the vision stack's output in what is read of it, for `count` targets.

        None: the output is read by another stack, `cross` or `fusion`. An architecture that pools otherwise than by
        CLS or mean must override this. Raises ModelError where it does not.
        """
        row = torch.zeros(count, tokens, dtype=torch.float32, device=self.device)
        if self.structure.pooling == "cls":
            row[:, 0] = 1
        elif self.structure.pooling == "mean":
            row[:, self.structure.prefix :] = 1 / (tokens - self.structure.prefix)
        elif self.structure.pooling in ("cross", "fusion"):
            return None
        else:
            raise ModelError(
                f"{type(self).__name__} has pooling {self.structure.pooling!r} and must override pooling_weights"
            )
        return row

    def chain_start(self, targets: Targets) -> Float[Tensor, "K Q"]:
        """Positions of the text side's sequence where chains of attention start, as weights that sum to 1.

        Default: where the targets are read.
        """
        assert targets.rows is not None
        return targets.rows

    def resolve(self, layer: str | None) -> str:
        """The module path of a layer as a user names it, see `ModelStructure.find_layer`. Raises LayerError."""
        return self.structure.find_layer(self.model, layer)

    def to_grid(
        self, hidden: Float[Tensor, "..."], grid: tuple[int, int], path: str = ""
    ) -> Float[Tensor, "B rows columns D"]:
        """The patches of the output of the module at `path` (default: of the vision stack), other tokens dropped.

        `grid` is that of the default layer; with `ModelStructure.pyramid` a layer's own may be another. Also takes the
        (B, D, rows, columns) of a convolution. Raises LayerError with the numbers where the tokens are not
        prefix + rows x columns.
        """
        return self.layout(hidden, grid, path).fold(hidden)

    def layout(self, hidden: Float[Tensor, "..."], grid: tuple[int, int], path: str = "") -> Layout:
        """Positions of the patches in the output of the module at `path`. Raises LayerError as `to_grid`."""
        prefix, tail = self.sequence(path)
        pyramid = self.structure.pyramid
        found = find_layout(tuple(hidden.shape), grid, prefix, tail=tail, pyramid=pyramid)
        if found is not None:
            return found
        rows, columns = grid
        if pyramid and not prefix:
            expected = f"maps over the whole picture, as the {rows} x {columns} of {self.structure.layer!r}, and more than 1 x 1"
        else:
            expected = (
                f"{prefix} prefix tokens + {rows} x {columns} patches = {prefix + rows * columns} tokens"
                f"{' and a text' if tail else ''}"
            )
        raise LayerError(f"a layer output of shape {tuple(hidden.shape)} is no patch grid: expected {expected}")

    def activations(self, inputs: Inputs, layer: str | None = None) -> Float[Tensor, "B rows columns D"]:
        """Patch features of a layer (default: the default tap), prefix tokens dropped; of a layer on the text side one
        row per caption."""
        path = self.resolve(layer)
        with Recorder(self.model, layers={path: False}) as recorder:
            self._run(inputs, path)
            recorder.check()
        return self.to_grid(recorder.outputs[path], self.grid(inputs), path)

    def attentions(self, inputs: Inputs, stack: str = "vision") -> list[Float[Tensor, "B H Q S"]]:
        """Attention weights of a stack, first block to last, whatever implementation the model was loaded with.

        Those of a stack that sees the text have the texts first.
        """
        found = self.structure.stack(stack)
        if not found.attention:
            raise ModelError(f"no attention of {self.info.type} can be recorded: {self.structure.unrecorded}")
        with Recorder(self.model, attention=dict.fromkeys(found.attention, False)) as recorder:
            self._run(inputs, found.blocks[0])
            recorder.check()
        return [recorder.weights[path] for path in found.attention]

    def _run(self, inputs: Inputs, path: str) -> None:
        """As much of the model as it takes for the module at `path` to run."""
        encoded = self.encode_images(inputs)
        if self.structure.axis(path) == "text":
            self.score(inputs, encoded, self.targets(inputs, [[tokens.caption()] for tokens in inputs.tokens]))

    def scores(self, inputs: Inputs, targets: Targets) -> Float[Tensor, "K"]:
        """The targets' values."""
        with Recorder(self.model):
            return self.forward(inputs, targets)

    def grid(self, inputs: Inputs) -> tuple[int, int]:
        """Rows and columns of the patch grid, the same for all pictures of a batch."""
        return inputs.geometry[0].rows, inputs.geometry[0].columns

    def text_conditioned(self, kind: str, gradient: bool) -> bool:
        """Whether a map of a target kind depends on the text: by gradient, or through a stack that sees the text."""
        return kind != "norm" and (gradient or bool(self.structure.text_stacks))

    @property
    def fast_taps(self) -> Mapping[str, tuple[str, ...]]:
        """Tap -> paths of the other modules whose outputs an overriding `shifts` reads; none by default."""
        return {}

    def shifts(
        self,
        layer: str,
        inputs: Inputs,
        targets: Targets,
        outputs: Mapping[str, Tensor],
        rule: str | None = None,
    ) -> Float[Tensor, "K D"]:
        """d score / d (one vector added to all patches of a fast tap), per target: all that Grad-CAM needs.

        `outputs` are what the pass gave at the tap and the places that `fast_taps` names for it.
        """
        features = outputs[layer]
        width = self.to_grid(features, self.grid(inputs), layer).shape[-1]
        zero = torch.zeros(len(targets), width, dtype=features.dtype, device=features.device)
        with torch.enable_grad():
            zero.requires_grad_()
            total = self.score_from(layer, inputs, targets, zero, outputs, rule).sum()
        [gradient] = torch.autograd.grad(total, zero)
        return gradient

    def from_tap(self, layer: str, features: Tensor) -> Tensor | None:  # noqa: ARG002
        """What `encode_images` gives where a fast tap gives `features`, if nothing but a LayerNorm lies between; else None."""
        return None

    def alternatives(self, inputs: Inputs, targets: Targets) -> Sequence[TokenProbability | None]:  # noqa: ARG002
        """Per target the probability of the token it explains, and the next best; None where there is none."""
        return [None] * len(targets)

    def score_from(
        self,
        layer: str,
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
        return shifted_scores(self, layer, inputs, targets, shift, rule)

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


def shifted_scores(
    adapter: Adapter, layer: str, inputs: Inputs, targets: Targets, shift: Float[Tensor, "K D"], rule: str | None
) -> Float[Tensor, "K"]:
    """The scores with one vector per target added to all patches of the tap, differentiable in `shift`."""
    inputs, targets = one_image_per_target(inputs, targets)
    module = find_module(adapter.model, layer)
    grid = adapter.grid(inputs)

    def shifted(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        # The targets' own sequences come first; others that a score is compared with stay as they are.
        hidden = adapter.layout(hidden, grid, layer).shifted(hidden, shift)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with Recorder(adapter.model, rule=rule):
        handle = module.register_forward_hook(shifted)
        try:
            with torch.enable_grad():
                return adapter.forward(inputs, targets)
        finally:
            handle.remove()
