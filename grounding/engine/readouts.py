"""Scores of single blocks: the score with the output of a block of the image encoder in place of that of the last.

One forward pass in which the graph is cut at every block: the gradient of the sum of all these scores with respect to
the attention of a block is that of the block's own score, so that one backward pass serves all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.adapter.base import Adapter, Features
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.readout import cut_blocks, ending_in, hidden_of, replaced
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import Stack
from grounding.adapter.vision_cache import map_features
from grounding.core.errors import ModelError
from grounding.engine.plan import MethodCall, Plan

# Largest difference, relative to the largest feature, between the features of a pass and those read from its last
# block: they come from the same operations.
SAME = 1e-2


@dataclass(frozen=True, eq=False)
class BlockScores:
    """Scores of single blocks.

    `features` of the images, off the graph; `leaves`: block -> attention weights (B, H, Q, S) on whose graph its scores
    are; `weights`: attention module -> weights of the pass; `totals` (K,): scores of each target summed over blocks.
    """

    features: Features
    leaves: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    totals: Float[Tensor, "K"]


def block_scores(
    adapter: Adapter, inputs: Inputs, targets: Targets, plan: Plan, calls: Sequence[MethodCall], rule: str | None
) -> BlockScores:
    """Return the scores of the blocks that method calls of one `Plan.readout` read. The state of the model is restored.

    Raises ModelError if the score reads more of the image encoder than the output of its last block.
    """
    readout = plan.readout(calls[0])
    stack = plan.structure.stack(plan.structure.path[-1].stack)
    read = plan.signals(calls)[1]
    wanted = _blocks(plan, calls, stack)
    pooled = plan.structure.path[0].kind == "pool"
    own = {path: gradient for path, gradient in read.items() if gradient and not pooled}
    with Recorder(adapter.model, {}, own, rule) as recorder:
        with cut_blocks(adapter.model, stack.blocks) as outputs:
            features = map_features(adapter.encode_images(inputs.images), Tensor.detach)
        recorder.check()
        _check(adapter, inputs, outputs, features)
        if not pooled:
            with torch.enable_grad():
                states = [hidden_of(outputs[path]) for path in wanted]
                if readout == "mean":
                    states = [state.mean(1, keepdim=True).expand_as(state) for state in states]
                scores = [_score(adapter, inputs, targets, outputs, state) for state in states]
            leaves = {path: recorder.weights[stack.attention[stack.blocks.index(path)]] for path in wanted}
            return BlockScores(features, leaves, recorder.weights, torch.stack(scores).sum(0))
    [head] = [path for path, gradient in read.items() if gradient]
    leaves, scores = {}, []
    for path in wanted:
        with Recorder(adapter.model, {}, {head: True}, rule) as recorder:
            scores.append(_score(adapter, inputs, targets, outputs, hidden_of(outputs[path]).detach()))
            recorder.check()
        leaves[path] = recorder.weights[head]
    return BlockScores(features, leaves, recorder.weights, torch.stack(scores).sum(0))


def _blocks(plan: Plan, calls: Sequence[MethodCall], stack: Stack) -> list[str]:
    """The blocks of the image encoder that any of the calls reads."""
    name = plan.structure.path[-1].stack
    read = [stack.blocks[call.method.reads(call.options, plan.structure)[name].blocks] for call in calls]
    return [path for path in stack.blocks if any(path in own for own in read)]


def _score(
    adapter: Adapter, inputs: Inputs, targets: Targets, outputs: Mapping[str, Any], hidden: Tensor
) -> Float[Tensor, "K"]:
    """The scores with `hidden` in place of the output of the last block."""
    with ending_in(adapter.model, outputs, hidden):
        features = adapter.encode_images(inputs.images)
    return adapter.score(inputs, features, targets)


@torch.no_grad()
def _check(adapter: Adapter, inputs: Inputs, outputs: Mapping[str, Any], features: Features) -> None:
    """Raise ModelError unless the features follow from the output of the last block alone."""
    blank = {path: replaced(output, torch.zeros_like(hidden_of(output))) for path, output in outputs.items()}
    with ending_in(adapter.model, blank, hidden_of(list(outputs.values())[-1])):
        found = adapter.encode_images(inputs.images)
    pairs = zip(*(one if isinstance(one, tuple) else (one,) for one in (features, found)), strict=True)
    if any((a - b).abs().max() > SAME * a.abs().max() for a, b in pairs):
        raise ModelError(
            f"the score of {adapter.info.type} reads more than the output of the last block of its image encoder: a "
            "single block has no score; use a method other than legrad"
        )
