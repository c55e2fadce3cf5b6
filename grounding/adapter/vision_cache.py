"""Cache of image features and recorded signals, reused for later texts on the same images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Inputs
from grounding.adapter.recorder import Recorder
from grounding.core.errors import NumericError

# The key of the image features among the recorded outputs.
ENCODED = "encoded"


def remembered(
    adapter: Adapter, inputs: Inputs, layers: Mapping[str, bool], attention: Mapping[str, bool]
) -> Mapping[str, Tensor]:
    """Return image features, layer outputs and attention weights recorded in a pass without gradients.

    The vision stack runs unless the cache of `inputs` contains all of them. Raises NumericError for NaN or Inf.
    """
    memory = inputs.memory
    if not _same(inputs) or not {ENCODED, *layers, *attention} <= memory.keys():
        with Recorder(adapter.model, layers, attention) as recorder:
            encoded = adapter.encode_images(inputs)
            recorder.check()
        for path, weights in recorder.weights.items():
            finite(weights, f"attention weights of {path}")
        keep(inputs, recorder.outputs | recorder.weights | {ENCODED: encoded})
    return memory


def encoded_of(adapter: Adapter, inputs: Inputs) -> Tensor:
    """Return the result of `Adapter.encode_images`, off the graph, from the cache if it is there."""
    return remembered(adapter, inputs, {}, {})[ENCODED]


def _same(inputs: Inputs) -> bool:
    """Whether the cache belongs to these images."""
    return all(inputs.memory.get(name) is inputs.tensors[name] for name in inputs.per_image)


def keep(inputs: Inputs, found: Mapping[str, Tensor]) -> None:
    """Add the outputs of a pass to the cache of these images."""
    if not _same(inputs):
        inputs.memory.clear()
    inputs.memory.update(found)
    inputs.memory.update({name: inputs.tensors[name] for name in inputs.per_image})


def finite(tensor: Tensor, what: str) -> None:
    """Raise NumericError if a tensor contains NaN or Inf."""
    # The sum is finite only if all terms are, and needs no mask. It may also overflow: then count.
    if not torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericError(
                f"{bad} of {tensor.numel()} {what} are NaN or Inf: the model's numbers cannot be explained"
            )
