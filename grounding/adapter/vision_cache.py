"""What passes through the vision stack left behind, for later texts of the same pictures."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Inputs
from grounding.adapter.recorder import Recorder
from grounding.core.errors import NumericError

# What the vision stack gave, among what is remembered of a pass.
ENCODED = "encoded"


def remembered(
    adapter: Adapter, inputs: Inputs, layers: Mapping[str, bool], attention: Mapping[str, bool]
) -> Mapping[str, Tensor]:
    """What one pass of the vision stack without gradients left behind: run now, unless an earlier one left it all."""
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
    """What `Adapter.encode_images` gives for these pictures, off the graph: run unless an earlier pass left it."""
    return remembered(adapter, inputs, {}, {})[ENCODED]


def _same(inputs: Inputs) -> bool:
    """Whether what is remembered is of these pictures and not of others."""
    return all(inputs.memory.get(name) is inputs.tensors[name] for name in inputs.per_image)


def keep(inputs: Inputs, found: Mapping[str, Tensor]) -> None:
    """Remember what a pass gave for these pictures, beside what earlier ones did."""
    if not _same(inputs):
        inputs.memory.clear()
    inputs.memory.update(found)
    inputs.memory.update({name: inputs.tensors[name] for name in inputs.per_image})


def finite(tensor: Tensor, what: str) -> None:
    """Raises NumericError where a tensor holds NaN or Inf."""
    # A sum is finite only if every term is: one pass without a mask. It may overflow by itself, so look again.
    if not torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericError(
                f"{bad} of {tensor.numel()} {what} are NaN or Inf: the model's numbers cannot be explained"
            )
