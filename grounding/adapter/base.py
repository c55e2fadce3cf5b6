"""The contract of an architecture: the base class of all adapters, and its optional parts.

An adapter wraps a model and its processor, and changes neither. The engine calls its methods in this order:

    structure(kind)                                attention stacks, path to the patches, default layer, pooling
    prepare_images(images) -> ImageInputs          B opened images, their views with geometry, the tensors of the model
    encode_images(images) -> Features              features of the images
    prepare_texts(images, queries) -> Inputs       T tokenized texts added
    targets(inputs, spans, kind, token_target)     K scalars to explain, one for each span of each text
    score(inputs, features, targets) -> (K)        the scalars, differentiable

An adapter never calls the engine: features are handed to it.

To add an architecture:

1. Subclass `Adapter`. Implement these six methods; set `model`, `info` and `target_kinds`. A model that scores classes
   subclasses `grounding.adapter.classification.ClassAdapter`.
2. Optional parts: a model that generates text implements `Generates`; one with a closed form of the pooled gradient at
   some layers returns a `Shortcut`; patches elsewhere than after a prefix, row by row, need `patch_tokens`.
3. Register it: a line in `adapters/table.py`, or an entry point of the group `grounding.adapters` in another
   distribution. The name is the first of `config.architectures`.
4. Test it: `grounding.testing.check_adapter(adapter, images, texts)`.

Requirements:

1. `encode_images` and `score` together are one forward pass, differentiable from every layer to every score.
2. Images are independent of each other (no batch statistics), and so are texts: one backward pass of a sum of scores
   gives the gradients of one target per image.
3. `prepare_images` returns a view with `Geometry` and patch grid for each image. `prepare_texts` reports truncated
   texts in `TokenizedText.warnings`.
4. `targets` scores a span according to `kind` and `token_target`. It raises TargetError for values that the
   architecture does not support, and lists those that it does.
5. Attention modules call an attention function of transformers, are `nn.MultiheadAttention`, apply a dropout module of
   their own to the weights (B, H, Q, S), or have an argument `output_attentions` and return these weights.

`docs/adapters.md` has a complete example. For Hugging Face models `adapters/shared/` has image processors with their
geometry, tokenization, text targets and text generation.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grounding.adapter.class_names import ClassNames
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.patch_tokens import PatchTokens, find_layout
from grounding.adapter.structure import ModelInfo, ModelStructure
from grounding.adapter.vision_cache import Features
from grounding.core.errors import LayerError, ModelError, TargetError
from grounding.core.registry import did_you_mean
from grounding.core.text import Alternative, Query, Span, TokenizedText

__all__ = [
    "TOKEN_TARGETS",
    "Adapter",
    "Classifies",
    "Features",
    "Generates",
    "ModelInfo",
    "Shortcut",
    "TokenProbability",
]

TOKEN_TARGETS = ("leave-one-out", "alone")
DEFAULT_METHODS = ("gradcam", "rollout", "relevance")
# The probability of a token (or class) at its position, and the most probable others.
TokenProbability = tuple[float, tuple[Alternative, ...]]
# Members of version 1 of the contract that the present one does not have.
FORMER = (
    "kinds",
    "sites",
    "see",
    "aimed",
    "asked_by",
    "looks_first",
    "fast_taps",
    "fast_kinds",
    "score_from",
    "shifts",
)


@runtime_checkable
class Shortcut(Protocol):
    """A closed form of the pooled gradient at some layers; it needs no graph through the model.

    `layers`: layer -> the other modules whose outputs `pooled_gradient` reads.
    """

    @property
    def layers(self) -> Mapping[str, tuple[str, ...]]:
        """The layers with a closed form."""

    def pooled_gradient(
        self,
        layer: str,
        inputs: Inputs,
        targets: Targets,
        outputs: Mapping[str, Tensor],
        rule: str | None,
    ) -> Float[Tensor, "K D"]:
        """Return the gradient at a layer summed over patches: d score / d (one vector added to all its patches).

        `outputs` are those recorded at the layer and at the modules that `layers` lists for it. `rule` is a backward
        rule as in `Recorder`.
        """

    def features(self, layer: str, output: Tensor, images: ImageInputs) -> Features | None:
        """Return the result of `encode_images` from the output of a layer if that is cheap (a norm), else None."""


@runtime_checkable
class Generates(Protocol):
    """The part of an adapter whose model generates text."""

    def generate(
        self, images: ImageInputs, features: Features, queries: Sequence[tuple[int, Query]]
    ) -> list[TokenizedText]:
        """Return the tokenized text of each query about an image (by its index).

        A query asks for a text that the model generates (`Generate`), or has a text that it is forced to generate.
        """


@runtime_checkable
class Classifies(Protocol):
    """The part of an adapter whose model scores classes."""

    class_names: ClassNames

    def logits(self, features: Features) -> Float[Tensor, "B C"]:
        """Return the logits of all classes from the result of `encode_images`."""


class Adapter(ABC):
    """Base class of adapters; see the module docstring for its requirements.

    Attributes
    ----------
    model: the wrapped model.
    info: its id, type and revision, for provenance.
    target_kinds: supported kinds of targets (`similarity`, `logit`, ...), the default first.
    text_independent: those of them that no text can change. They need no text and have one entry, of kind `image`.
    target_options: "kind.option" -> its values, the default first.
    token_targets: how a part of a text is scored, the default first: `leave-one-out` (score of the text minus the score
        without the part), `alone` (as a text of its own). Empty: each token has its own score.
    default_methods: methods of an explanation if none are requested.
    sample: the query that `list_layers` runs the model with if no text is given.

    An adapter of the first version of this contract is refused at construction with a ModelError.
    """

    model: nn.Module
    info: ModelInfo
    target_kinds: ClassVar[tuple[str, ...]]
    text_independent: ClassVar[tuple[str, ...]] = ()
    target_options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    token_targets: ClassVar[tuple[str, ...]] = TOKEN_TARGETS
    default_methods: ClassVar[tuple[str, ...]] = DEFAULT_METHODS
    sample: ClassVar[Query] = Query("picture")

    def __new__(cls, *_: Any, **__: Any) -> Adapter:
        """Refuse classes that do not implement the contract. Raises ModelError."""
        former = [name for name in FORMER if hasattr(cls, name)]
        if isinstance(inspect.getattr_static(cls, "structure"), property | cached_property):
            former.append("structure without a kind of target")
        missing = sorted(cls.__abstractmethods__) + ([] if hasattr(cls, "target_kinds") else ["target_kinds"])
        if former or missing:
            what = f"implements version 1 of the adapter contract ({', '.join(former)})" if former else ""
            lacks = f"does not implement {', '.join(missing)}" if missing else ""
            raise ModelError(
                f"{cls.__name__} {' and '.join(filter(None, (what, lacks)))}: see docs/adapters.md for the contract"
            )
        return super().__new__(cls)

    # ------------------------------------------------------------------ to implement

    @abstractmethod
    def structure(self, kind: str) -> ModelStructure:
        """Return attention stacks, path to the patches, default layer and pooling for a kind of target."""

    @abstractmethod
    def prepare_images(self, images: Sequence[Any]) -> ImageInputs:
        """Return inputs for B images (anything that `open_image` accepts).

        `explain` accepts the result in place of the images; it then runs the vision stack once for all texts of later
        calls. Raises ImageError.
        """

    @abstractmethod
    def prepare_texts(self, images: ImageInputs, queries: Sequence[Sequence[Query]]) -> Inputs:
        """Return the inputs of T texts; `queries[b]` are those about image b, any number of any length.

        It runs no part of the model. A query has a text, a `TokenizedText` (which the model generated), or `Classes`.
        Raises TextError.
        """

    @abstractmethod
    def targets(
        self, inputs: Inputs, spans: Sequence[Sequence[Span]], kind: str, token_target: str | None = None
    ) -> Targets:
        """Return K targets, one for each span in `spans[t]` of each text t, in this order.

        `kind` and `token_target` are among `target_kinds` and `token_targets`; None: the first. Raises TargetError for
        others (`check_target` does).
        """

    @abstractmethod
    def encode_images(self, images: ImageInputs) -> Features:
        """Run the vision side: return the features from which `score` continues, differentiable.

        A tensor whose leading axis counts images, or a tuple of tensors in any form.
        """

    @abstractmethod
    def score(self, inputs: Inputs, features: Features, targets: Targets) -> Float[Tensor, "K"]:
        """Return the scores (K,) from the result of `encode_images`, differentiable."""

    @classmethod
    def from_checkpoint(cls, source: Any) -> Adapter:
        """Return the adapter of a checkpoint, for `adapters.load`; optional.

        `source` has `model(class)`, `tokenizer()`, `image_processor()` and `info(model, image_processor)`. Raises
        ModelError where it is not implemented.
        """
        raise ModelError(f"{cls.__name__} cannot load {source.id!r} by name: construct it with a loaded model")

    # ------------------------------------------------------------------ optional

    def shortcut(self, kind: str) -> Shortcut | None:  # noqa: ARG002
        """Return the closed form of the pooled gradient for a kind of target, None if there is none."""
        return None

    def patch_tokens(self, path: str, inputs: Inputs, shape: tuple[int, ...]) -> tuple[PatchTokens, ...]:
        """Return the positions of the patches in the output, of this shape, of the module at `path`.

        One item per view; on the sequence side of the model one per text and view of its image, with `item` the index
        of the text. Default: the tokens (B, N, D) of `ModelStructure.prefix` tokens and the patches row by row, or
        feature maps (B, D, rows, columns). Raises LayerError for an output without a patch grid.
        """
        return self.regular_patch_tokens(path, inputs, shape)

    def regular_patch_tokens(
        self, path: str, inputs: Inputs, shape: tuple[int, ...], prefix: int | None = None, *, tail: bool = False
    ) -> tuple[PatchTokens, ...]:
        """Return `patch_tokens` of an output with one item per image (or text) and the same grid in each.

        `prefix` tokens (None: those of the structure) precede the patches; with `tail`, others may follow them. Raises
        LayerError.
        """
        structure = self.structure(self.target_kinds[0])
        prefix = structure.prefix if prefix is None else prefix
        geometry = inputs.images.geometry(0)
        rows, columns = geometry.rows, geometry.columns
        found = find_layout(shape, (rows, columns), prefix, tail=tail, pyramid=structure.pyramid)
        if found is None:
            if structure.pyramid and not prefix:
                expected = (
                    f"maps over the whole image, as the {rows} x {columns} of {structure.default_layer!r}, and more "
                    "than 1 x 1"
                )
            else:
                expected = (
                    f"{prefix} prefix tokens + {rows} x {columns} patches = {prefix + rows * columns} tokens"
                    f"{' and a text' if tail else ''}"
                )
            raise LayerError(f"a layer output of shape {shape} is no patch grid: expected {expected}")
        if structure.items(path) == "image":
            return tuple(found.tokens(view, view) for view in range(len(inputs.images.views)))
        return tuple(found.tokens(image, text) for text, image in enumerate(inputs.text_image))

    def pooling_weights(self, kind: str, count: int, tokens: int) -> Float[Tensor, "K N"]:
        """Return the weight of each of the `tokens` of the vision stack in its pooling, for `count` targets.

        Weights sum to 1. Architectures with pooling `tokens` must override this; it raises ModelError for them.
        """
        structure = self.structure(kind)
        row = torch.zeros(count, tokens, dtype=torch.float32, device=self.device)
        if structure.pooling == "cls":
            row[:, 0] = 1
        elif structure.pooling == "mean":
            row[:, structure.prefix :] = 1 / (tokens - structure.prefix)
        elif structure.pooling == "attention_pool":
            row[:, 0] = 1  # the one learned query
        else:
            raise ModelError(
                f"{type(self).__name__} has pooling {structure.pooling!r} and must override pooling_weights"
            )
        return row

    def probabilities(
        self,
        inputs: Inputs,  # noqa: ARG002
        features: Features,  # noqa: ARG002
        targets: Targets,
    ) -> Sequence[TokenProbability | None]:
        """Return for each target the probability of its token (class, text) and the most probable others, or None."""
        return [None] * len(targets)

    # ------------------------------------------------------------------ inherited

    def forward(self, inputs: Inputs, targets: Targets) -> Float[Tensor, "K"]:
        """Return the scores (K,), differentiable, in one forward pass."""
        return self.score(inputs, self.encode_images(inputs.images), targets)

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""
        return isinstance(self, Generates)

    @property
    def device(self) -> torch.device:
        """The device of the model. Raises ModelError for parameters on the meta device (offloaded to disk)."""
        found = list(dict.fromkeys(parameter.device for parameter in self.model.parameters()))
        if any(device.type == "meta" for device in found):
            raise ModelError("some weights are on the meta device (offloaded?): load the whole model onto one device")
        return found[0] if found else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The precision the model computes in."""
        return next((parameter.dtype for parameter in self.model.parameters()), torch.float32)

    def check_target(self, kind: str | None, token_target: str | None = None) -> tuple[str, str | None]:
        """Return target kind and token target (None: the default). Raises TargetError listing the supported ones."""
        kind, token_target = kind or self.target_kinds[0], token_target or next(iter(self.token_targets), None)
        for what, name, known in (
            ("target", kind, self.target_kinds),
            ("token target", token_target, self.token_targets),
        ):
            if name is not None and name not in known:
                raise TargetError(
                    f"{self.info.type} has no {what} {name!r}{did_you_mean(name, list(known))} "
                    f"(it has: {', '.join(known) or 'none, each token has its own score'})"
                )
        return kind, token_target

    def text_conditioned(self, kind: str, gradient: bool) -> bool:
        """Whether maps of a target kind depend on the text: by their gradient, or through attention that does."""
        return kind not in self.text_independent and (gradient or self.structure(kind).reads_sequence)
