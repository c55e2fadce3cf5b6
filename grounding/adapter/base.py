"""The contract of an architecture: the base class of all adapters.

An adapter wraps a model and its processor, and changes neither. The engine calls its methods in this order:

    structure                              attention stacks, default layer, pooling of the model
    prepare_images(images) -> Inputs       B opened images, their geometry, the tensors of the model
    prepare_texts(inputs, texts) -> Inputs T tokenized texts added
    targets(inputs, spans, ...) -> Targets K scalars to explain, one for each span of each text
    encode_images(inputs) -> (B, ...)      features of the images
    score(inputs, encoded, targets) -> (K) the scalars, differentiable

To add an architecture:

1. Subclass `Adapter`. Implement these six members; set `model`, `info` and `kinds`. A model that scores classes
   subclasses `grounding.adapter.classification.ClassAdapter` and implements `structure`, `labels`, `prepare_images` and
   `logits` only.
2. Register it: a line in `adapters/table.py`, or an entry point of the group `grounding.adapters` in another
   distribution. The name is the first of `config.architectures`.
3. In this repository, add a tiny model to FACTORIES in `tests/support/models.py`: the contract tests then run on it.

Requirements:

1. `encode_images` and `score` together are one forward pass, differentiable from every layer to every score.
2. Images are independent of each other (no batch statistics), and so are texts: one backward pass of a sum of scores
   gives the gradients of one target per image.
3. `prepare_images` returns a `Geometry` with patch grid for each image. `prepare_texts` reports truncated texts in
   `text_warnings`.
4. `targets` scores a span according to `kind` and `token_target`. It raises TargetError for values that the
   architecture does not support, and lists those that it does.
5. Attention modules call an attention function of transformers, or have an argument `output_attentions` and return the
   weights (B, H, Q, S) that they use beside their output.

`docs/adapters.md` has a complete example. For Hugging Face models `adapters/shared/` has image processors with their
geometry, tokenization, text targets and text generation.
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
# The probability of a token (or class) at its position, and the most probable others.
TokenProbability = tuple[float, tuple[Alternative, ...]]


class Adapter(ABC):
    """Base class of adapters; see the module docstring for its requirements.

    Attributes
    ----------
    model: the wrapped model.
    info: its id, type and revision, for provenance.
    kinds: supported target kinds (`similarity`, `logit`, ...), the default first.
    token_targets: how a part of a text is scored, the default first: `leave-one-out` (score of the text minus the score
        without the part), `alone` (as a text of its own). Empty: each token has its own score.
    default_methods: methods of an explanation if none are requested.
    generates: whether the model can generate the text; `prepare_texts` then accepts `Generate` in place of a text.
    sample_text: the text (or class) that `list_layers` runs the model on if none is given.
    fast_kinds: target kinds for which `shifts` is implemented at the layers in `fast_taps`.
    """

    model: nn.Module
    info: ModelInfo
    kinds: ClassVar[tuple[str, ...]]
    token_targets: ClassVar[tuple[str, ...]] = TOKEN_TARGETS
    default_methods: ClassVar[tuple[str, ...]] = DEFAULT_METHODS
    generates: ClassVar[bool] = False
    sample_text: ClassVar[Asked] = "picture"
    fast_kinds: ClassVar[tuple[str, ...]] = ()

    # ------------------------------------------------------------------ to implement

    @property
    @abstractmethod
    def structure(self) -> ModelStructure:
        """Attention stacks, default layer and pooling of this model."""

    @abstractmethod
    def prepare_images(self, images: Sequence[Any]) -> Inputs:
        """Return inputs for B images (anything that `open_image` accepts), without texts.

        Sets `images`, `geometry` (one with patch grid for each image), `tensors` and `warnings`. `explain` accepts the
        result in place of the images; it then runs the vision stack once for all texts of later calls. Raises
        ImageError.
        """

    @abstractmethod
    def prepare_texts(self, inputs: Inputs, texts: Sequence[Sequence[Asked]]) -> Inputs:
        """Return the inputs with T tokenized texts added; `texts[b]` are those of image b, any number of any length.

        Sets `tokens`, `text_image`, `text_warnings`, and the tensors of the texts with their names in `per_text`.
        Raises TextError.
        """

    @abstractmethod
    def targets(
        self,
        inputs: Inputs,
        spans: Sequence[Sequence[Span]],
        kind: str | None = None,
        token_target: str | None = None,
    ) -> Targets:
        """Return K targets, one for each span in `spans[t]` of each text t, in this order.

        `kind` and `token_target` are among `kinds` and `token_targets`; None: the first. Raises TargetError for others
        (`check_kind` does).
        """

    @abstractmethod
    def encode_images(self, inputs: Inputs) -> Float[Tensor, "B ..."]:
        """Run the vision stack: return the features of B images from which `score` continues, differentiable."""

    @abstractmethod
    def score(self, inputs: Inputs, encoded: Float[Tensor, "B ..."], targets: Targets) -> Float[Tensor, "K"]:
        """Return the scores (K,) from the result of `encode_images`, differentiable."""

    @classmethod
    def from_checkpoint(cls, source: Any) -> Adapter:
        """Return the adapter of a checkpoint, for `adapters.load`; optional.

        `source` has `model(class)`, `tokenizer()`, `image_processor()` and `info(model, image_processor)`. Raises
        ModelError where it is not implemented.
        """
        raise ModelError(f"{cls.__name__} cannot load {source.id!r} by name: construct it with a loaded model")

    # ------------------------------------------------------------------ inherited

    def asked(self, text: Any) -> Asked:
        """Return a checked request: a text; if the model generates texts, also `Generate` (or None for it).

        Raises TextError.
        """
        if self.generates and (text is None or isinstance(text, Generate)):
            return text or Generate()
        if text is None:
            raise TextError("no text was given, and this model generates no text: give one")
        return check_text(text)

    def asked_by(self, target: Any, texts: Any) -> tuple[str | None, Any]:
        """Return the target kind and the texts, from the arguments `target` and `texts` of `explain`.

        Overridden where a target names classes. Raises TargetError for a target that is no kind.
        """
        if target is not None and not isinstance(target, str):
            raise TargetError(f"{self.info.type} has targets {', '.join(self.kinds)} and no classes, got {target!r}")
        return target, texts

    @property
    def needs_text(self) -> bool:
        """Whether a text must be given."""
        return not self.generates

    def looks_first(self, texts: Sequence[Sequence[Asked]]) -> bool:  # noqa: ARG002
        """Whether `prepare_texts` needs image features for these texts (to generate a text or predict a class)."""
        return self.generates

    def aimed(self, kind: str | None, options: Mapping[str, Any] | None = None) -> Adapter:
        """Return the adapter for a target kind (None: the default), for architectures whose structure depends on it.

        `options` are those of targets, "kind.option" -> value. Raises TargetError, OptionError.
        """
        self.check_kind(kind)
        for key in options or {}:
            raise OptionError(f"option {key!r}: targets of {self.info.type} have no options")
        return self

    def prepare(self, images: Sequence[Any], texts: Sequence[Sequence[Asked]]) -> Inputs:
        """Prepare images and the texts of each; `texts[b]` are those of image b."""
        return self.prepare_texts(self.prepare_images(images), texts)

    def forward(self, inputs: Inputs, targets: Targets) -> Float[Tensor, "K"]:
        """Return the scores (K,), differentiable, in one forward pass."""
        return self.score(inputs, self.encode_images(inputs), targets)

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

    def sequence(self, path: str) -> tuple[int, bool]:
        """Return the number of tokens before the patches in a module's output, and whether others follow them."""
        del path
        return self.structure.prefix, False

    def pooling_weights(self, count: int, tokens: int) -> Float[Tensor, "K N"] | None:
        """Return the weight of each of the `tokens` of the vision stack in its pooling, for `count` targets.

        Weights sum to 1. None: the output is read by another stack (pooling `cross` or `fusion`). Architectures with
        another pooling than the CLS token or the mean over patches must override this; it raises ModelError for them.
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
        """Return the start of attention chains over the positions of the text side: weights that sum to 1.

        Default: the positions at which the targets are read (`Targets.rows`).
        """
        assert targets.rows is not None
        return targets.rows

    def resolve(self, layer: str | None) -> str:
        """Return the module path of a layer name, see `ModelStructure.find_layer`. Raises LayerError."""
        return self.structure.find_layer(self.model, layer)

    def to_grid(
        self, hidden: Float[Tensor, "..."], grid: tuple[int, int], path: str = ""
    ) -> Float[Tensor, "B rows columns D"]:
        """Return the patches in the output of the module at `path` (default: of the vision stack).

        `grid` is that of the default layer; with `ModelStructure.pyramid` the layer may have another. Accepts tokens
        (B, N, D) and feature maps of convolutions (B, D, rows, columns). Raises LayerError where the number of tokens
        is not prefix + rows x columns.
        """
        return self.layout(hidden, grid, path).fold(hidden)

    def layout(self, hidden: Float[Tensor, "..."], grid: tuple[int, int], path: str = "") -> Layout:
        """Return the layout of the patches in the output of the module at `path`. Raises LayerError as `to_grid`."""
        prefix, tail = self.sequence(path)
        pyramid = self.structure.pyramid
        found = find_layout(tuple(hidden.shape), grid, prefix, tail=tail, pyramid=pyramid)
        if found is not None:
            return found
        rows, columns = grid
        if pyramid and not prefix:
            expected = (
                f"maps over the whole image, as the {rows} x {columns} of {self.structure.layer!r}, and more than 1 x 1"
            )
        else:
            expected = (
                f"{prefix} prefix tokens + {rows} x {columns} patches = {prefix + rows * columns} tokens"
                f"{' and a text' if tail else ''}"
            )
        raise LayerError(f"a layer output of shape {tuple(hidden.shape)} is no patch grid: expected {expected}")

    def activations(self, inputs: Inputs, layer: str | None = None) -> Float[Tensor, "B rows columns D"]:
        """Return the patch features of a layer (None: the default layer), without prefix tokens.

        A layer on the text side has one item per text in place of one per image. Raises LayerError.
        """
        path = self.resolve(layer)
        with Recorder(self.model, layers={path: False}) as recorder:
            self._run(inputs, path)
            recorder.check()
        return self.to_grid(recorder.outputs[path], self.grid(inputs), path)

    def attentions(self, inputs: Inputs, stack: str = "vision") -> list[Float[Tensor, "B H Q S"]]:
        """Return the attention weights of a stack, first block to last, for any attention implementation.

        Stacks on the text side have one item per text in place of one per image. Raises LayerError for an unknown
        stack, ModelError where its weights cannot be recorded.
        """
        found = self.structure.stack(stack)
        if not found.attention:
            raise ModelError(f"no attention of {self.info.type} can be recorded: {self.structure.unrecorded}")
        with Recorder(self.model, attention=dict.fromkeys(found.attention, False)) as recorder:
            self._run(inputs, found.blocks[0])
            recorder.check()
        return [recorder.weights[path] for path in found.attention]

    def _run(self, inputs: Inputs, path: str) -> None:
        """Run the part of the model that contains the module at `path`."""
        encoded = self.encode_images(inputs)
        if self.structure.axis(path) == "text":
            self.score(inputs, encoded, self.targets(inputs, [[tokens.caption()] for tokens in inputs.tokens]))

    def scores(self, inputs: Inputs, targets: Targets) -> Float[Tensor, "K"]:
        """Return the scores (K,) without gradients; the state of the model is restored."""
        with Recorder(self.model):
            return self.forward(inputs, targets)

    def grid(self, inputs: Inputs) -> tuple[int, int]:
        """Return (rows, columns) of the patch grid, which is the same for all images of a batch."""
        return inputs.geometry[0].rows, inputs.geometry[0].columns

    def text_conditioned(self, kind: str, gradient: bool) -> bool:
        """Whether maps of a target kind depend on the text: by their gradient, or through attention that does."""
        return kind != "norm" and (gradient or bool(self.structure.text_stacks))

    @property
    def fast_taps(self) -> Mapping[str, tuple[str, ...]]:
        """Layers with a shortcut for the pooled gradient -> the other modules whose outputs `shifts` reads there."""
        return {}

    def shifts(
        self,
        layer: str,
        inputs: Inputs,
        targets: Targets,
        outputs: Mapping[str, Tensor],
        rule: str | None = None,
    ) -> Float[Tensor, "K D"]:
        """Return the pooled gradient at a layer in `fast_taps`: d score / d (one vector added to all its patches).

        `outputs` are the outputs recorded at the layer and at the modules that `fast_taps` lists for it. `rule` is a
        backward rule as in `Recorder`.
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
        """Return the result of `encode_images` from the output of a layer, if only a LayerNorm follows; else None."""
        return None

    def alternatives(self, inputs: Inputs, targets: Targets) -> Sequence[TokenProbability | None]:  # noqa: ARG002
        """Return for each target the probability of its token (or class) and the most probable others, or None."""
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
        """Return the scores with one vector per target added to all patches of a layer, differentiable in `shift`.

        Its gradient at shift 0 is the pooled gradient. This general implementation copies the image for each target and
        runs the whole model. An architecture may override it at the layers in `fast_taps`, where it may start from the
        recorded `outputs` and has to be exact to first order only. `rule` is a backward rule as in `Recorder`.
        """
        return shifted_scores(self, layer, inputs, targets, shift, rule)

    def check_kind(self, kind: str | None, token_target: str | None = None) -> tuple[str, str | None]:
        """Return target kind and token target (None: the default). Raises TargetError listing the supported ones."""
        kind, token_target = kind or self.kinds[0], token_target or next(iter(self.token_targets), None)
        for what, name, known in (("target", kind, self.kinds), ("token target", token_target, self.token_targets)):
            if name is not None and name not in known:
                raise TargetError(
                    f"{self.info.type} has no {what} {name!r}{did_you_mean(name, list(known))} "
                    f"(it has: {', '.join(known) or 'none, each token has its own score'})"
                )
        return kind, token_target


def shifted_scores(
    adapter: Adapter, layer: str, inputs: Inputs, targets: Targets, shift: Float[Tensor, "K D"], rule: str | None
) -> Float[Tensor, "K"]:
    """Return the scores with one vector per target added to all patches of a layer; see `Adapter.score_from`."""
    inputs, targets = one_image_per_target(inputs, targets)
    module = find_module(adapter.model, layer)
    grid = adapter.grid(inputs)

    def shifted(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        # The sequences of the targets come first; those whose scores are subtracted are not shifted.
        hidden = adapter.layout(hidden, grid, layer).shifted(hidden, shift)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with Recorder(adapter.model, rule=rule):
        handle = module.register_forward_hook(shifted)
        try:
            with torch.enable_grad():
                return adapter.forward(inputs, targets)
        finally:
            handle.remove()
