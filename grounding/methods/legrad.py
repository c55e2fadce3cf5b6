"""LeGrad: positive attention gradients of the score that each block's own output would have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.adapter.structure import Hop, ModelStructure
from grounding.core.errors import OptionError
from grounding.methods.attention import LAST, index_of
from grounding.methods.base import NoAttentionError, Reading, method, whole_path
from grounding.methods.trace import Trace


def _hops(structure: ModelStructure) -> tuple[Hop, Hop]:
    """The hop whose attention is read and that through the image encoder. Raises NoAttentionError if the score does not
    read the pooled output of an image encoder."""
    path = whole_path(structure)
    if [hop.kind for hop in path] not in (["self"], ["pool", "self"]) or structure.reads_sequence:
        raise NoAttentionError("pooled vision attention")
    return path[0], path[-1]


def _reads(options: Mapping[str, Any], structure: ModelStructure) -> Mapping[str, Reading]:
    read, vision = _hops(structure)
    blocks = structure.stack(vision.stack).blocks
    start = index_of(options["start_layer"], len(blocks), "legrad.start_layer")
    if read.kind == "pool":
        own = Reading(slice(start, None), readout="own")
        return {vision.stack: own, read.stack: Reading(LAST, gradient=True, readout="own")}
    return {vision.stack: Reading(slice(start, None), gradient=True, readout=options["pooling"])}


@method("LeGrad", {"readout_gradient"}, reads=_reads)
def legrad(
    trace: Trace,
    *,
    pooling: Literal["mean", "own"] = "mean",  # noqa: ARG001 - read by `_reads`
    start_layer: int = 0,
) -> Float[Tensor, "k rows columns"]:
    """LeGrad: mean over blocks l, heads and queries of (G^l)+, G^l = d s^l / d A^l, with A^l the attention of block l
    and s^l the score with the output of block l in place of the last.

    With an attention pooling head, A^l is the attention of that head on the output of block l (norm included).
    Source: Bousselham et al. 2024, arXiv:2404.03214.
    Departures: the mean over blocks (published code: the sum), and all of them (`start_layer` 0; the code's default is
    the last two, -2). `pooling`: mean, as published, over all tokens, also where the model pools its CLS; own: as the
    model pools. The code leaves out the norm before an attention pooling head, and sets a map to 0 where "a photo of a"
    is above 0.8; neither is done here.
    Range: >= 0. Sign: never negative. A is not multiplied in.
    Cost: one backward pass per target, through each block by itself; one more forward pass.
    """
    read, vision = _hops(trace.structure)
    if trace.packed(read.stack):
        raise OptionError("method 'legrad' reads one matrix of attention per image, but here images are cut into tiles")
    gradients = trace.readout_gradients(vision.stack, slice(start_layer, None))
    means = torch.stack([gradient.clamp(min=0).mean((1, 2)) for gradient in gradients]).mean(0)
    return trace.patches(means[trace.owner(read.stack)], read)
