"""Class activation maps: patch features of one layer, weighted by what the score's gradient says of them."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from grounding.method import NotNegative, method
from grounding.recorder import LAYERNORM_RULE
from grounding.trace import Trace


@method("Grad-CAM", {"activations", "shift"}, signed=True)
def gradcam(trace: Trace, *, token_centred: bool = False, smooth: NotNegative = 0.0) -> Float[Tensor, "k rows columns"]:
    """Grad-CAM (Selvaraju et al. 2017, eq. 1-2): sum_d w_d F_pd with w_d = mean_p d score / d F_pd.

    Raw and signed: the paper's final ReLU is a matter of the view (option `threshold`). `token_centred` takes the
    mean over patches off the features first, `smooth` blurs the map with a Gaussian of that many patches.
    Cost: one backward from the score to the tap per target.
    """
    return weighted_features(trace, token_centred, smooth)


@method("Grad-CAM (LN-rule)", {"activations", "shift"}, signed=True, rule=LAYERNORM_RULE)
def gradcam_ln(
    trace: Trace, *, token_centred: bool = False, smooth: NotNegative = 0.0
) -> Float[Tensor, "k rows columns"]:
    """Grad-CAM whose backward pass treats every LayerNorm's standard deviation as a constant.

    The rule is that of conservative propagation for transformers (Ali et al. 2022). A layer that is read only through a
    LayerNorm has a true gradient orthogonal to its features, which leaves Grad-CAM with cross-patch terms alone; under
    the rule the evidence along the features counts. Scores are unchanged; signed as Grad-CAM. Cost: as Grad-CAM, and
    off the fast taps a forward pass of its own.
    """
    return weighted_features(trace, token_centred, smooth)


def weighted_features(trace: Trace, token_centred: bool, smooth: float) -> Float[Tensor, "k rows columns"]:
    """sum_d w_d F_pd with w_d the mean gradient of channel d over patches."""
    patches = trace.grid[0] * trace.grid[1]
    maps = trace.weighted(trace.shift() / patches, centred=token_centred)
    if trace.compares:
        # What a caption has over the one it is compared with: either's features with its own gradient.
        maps = maps + trace.weighted(trace.shift(other=True) / patches, centred=token_centred, other=True)
    return smoothed(maps, smooth)


def smoothed(maps: Float[Tensor, "k rows columns"], sigma: float) -> Float[Tensor, "k rows columns"]:
    """The maps blurred by a Gaussian of `sigma` patches (0: as they are), edges mirrored."""
    if sigma == 0:
        return maps
    for axis in (1, 2):
        # A mirror cannot reach further than the map goes.
        radius = min(math.ceil(3 * sigma), maps.shape[axis] - 1)
        x = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
        kernel = torch.exp(-0.5 * (x / sigma) ** 2)
        rows = rearrange(maps.movedim(axis, -1), "k other n -> (k other) 1 n")
        rows = F.conv1d(F.pad(rows, (radius, radius), mode="reflect"), (kernel / kernel.sum())[None, None])
        maps = rearrange(rows, "(k other) 1 n -> k other n", k=maps.shape[0]).movedim(-1, axis)
    return maps
