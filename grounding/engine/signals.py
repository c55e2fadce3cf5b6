"""Read single signals of a model: scores, patch features of a layer, attention weights of a stack."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.patch_tokens import fold, shifted
from grounding.adapter.recorder import Recorder, find_module
from grounding.adapter.replicate import one_image_per_target
from grounding.core.errors import ModelError


def scores(adapter: Adapter, inputs: Inputs, targets: Targets) -> Float[Tensor, "K"]:
    """Return the scores (K,) without gradients; the state of the model is restored."""
    with Recorder(adapter.model):
        return adapter.forward(inputs, targets)


def activations(
    adapter: Adapter, inputs: Inputs, layer: str | None = None, kind: str | None = None
) -> Float[Tensor, "V rows columns D"]:
    """Return the patch features of a layer (None: the default layer of the kind of target), without prefix tokens.

    One item per view; a layer on the sequence side has one per text. All must have the same patch grid. Raises
    LayerError.
    """
    kind, _ = adapter.check_target(kind)
    path = adapter.structure(kind).find_layer(adapter.model, layer)
    with Recorder(adapter.model, layers={path: False}) as recorder:
        _run(adapter, inputs, path, kind)
        recorder.check()
    output = recorder.outputs[path]
    return fold(output, adapter.patch_tokens(path, inputs, tuple(output.shape)))


def attentions(
    adapter: Adapter, inputs: Inputs, stack: str = "vision", kind: str | None = None
) -> list[Float[Tensor, "B H Q S"]]:
    """Return the attention weights of a stack, first block to last, for any attention implementation.

    Stacks on the sequence side have one item per text in place of one per image. Raises LayerError for an unknown
    stack, ModelError where its weights cannot be recorded.
    """
    kind, _ = adapter.check_target(kind)
    structure = adapter.structure(kind)
    found = structure.stack(stack)
    if not found.attention:
        raise ModelError(f"no attention of {adapter.info.type} can be recorded: {structure.unrecorded}")
    with Recorder(adapter.model, attention=dict.fromkeys(found.attention, False)) as recorder:
        _run(adapter, inputs, found.blocks[0], kind)
        recorder.check()
    return [recorder.weights[path] for path in found.attention]


def pooled_gradient(
    adapter: Adapter, inputs: Inputs, targets: Targets, layer: str, rule: str | None = None
) -> Float[Tensor, "K D"]:
    """Return the pooled gradient of each target at a layer, from its definition: d score / d (one vector added to all
    patches), with a copy of the image for each target and the whole model on the graph.

    `rule` is a backward rule as in `Recorder`. Slow; the reference for shortcuts.
    """
    inputs, targets = one_image_per_target(inputs, targets)
    shift: list[Tensor] = []

    def moved(_module: nn.Module, _args: object, output: Any) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        # The sequences of the targets come first; those whose scores are subtracted are not shifted.
        places = adapter.patch_tokens(layer, inputs, tuple(hidden.shape))
        with torch.enable_grad():
            width = fold(hidden, places[:1]).shape[-1]
            shift.append(hidden.new_zeros(len(targets), width).requires_grad_())
            hidden = shifted(hidden, places[: len(targets)], shift[0])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with Recorder(adapter.model, rule=rule):
        handle = find_module(adapter.model, layer).register_forward_hook(moved)
        try:
            with torch.enable_grad():
                total = adapter.forward(inputs, targets).sum()
        finally:
            handle.remove()
    [gradient] = torch.autograd.grad(total, shift[0])
    return gradient


def _run(adapter: Adapter, inputs: Inputs, path: str, kind: str) -> None:
    """Run the part of the model that contains the module at `path`."""
    features = adapter.encode_images(inputs.images)
    if adapter.structure(kind).items(path) == "sequence":
        spans = [[text.caption()] for text in inputs.texts]
        adapter.score(inputs, features, adapter.targets(inputs, spans, kind))
