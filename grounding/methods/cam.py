"""Class activation maps: features of one layer weighted by gradients (Grad-CAM, HiResCAM, LayerCAM, Grad-CAM++).

Notation: F (P, D) are the features of one layer, g = d score / d F, P patches, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from grounding.adapter.layernorm import LAYERNORM_RULE
from grounding.methods.base import method
from grounding.methods.options import NotNegative
from grounding.methods.trace import Trace


@method("Grad-CAM", {"activations", "pooled_gradient"}, signed=True)
def gradcam(trace: Trace, *, token_centred: bool = False, smooth: NotNegative = 0.0) -> Float[Tensor, "k rows columns"]:
    """Grad-CAM: sum_d w_d F_pd with w_d = mean_p g_pd.

    Source: Selvaraju et al. 2017, arXiv:1610.02391, eq. 1-2.
    Departures: the final ReLU is left to the view (option `threshold`). `token_centred` subtracts the mean over patches
    from the features; `smooth` blurs the map with a Gaussian of that many patches.
    Range: unbounded. Sign: signed; positive values raise the score.
    Cost: one backward pass from the score to the layer per target.
    """
    return weighted_features(trace, token_centred, smooth)


@method("Grad-CAM (LN-rule)", {"activations", "pooled_gradient"}, signed=True, rule=LAYERNORM_RULE)
def gradcam_ln(
    trace: Trace, *, token_centred: bool = False, smooth: NotNegative = 0.0
) -> Float[Tensor, "k rows columns"]:
    """Grad-CAM with the LN-rule: in the backward pass the standard deviation of every LayerNorm is a constant.

    Source: Grad-CAM as `gradcam`; the rule from conservative propagation for transformers (Ali et al. 2022,
    arXiv:2202.07304), without its rule for attention.
    Why: if a layer is read only through a LayerNorm, its gradient is orthogonal to its features at every patch, and
    Grad-CAM keeps only the terms between patches. Under the rule the component along the features counts. Scores are
    unchanged.
    Range and sign: as `gradcam`.
    Cost: as `gradcam`, and at layers without a shortcut one more forward pass.
    """
    return weighted_features(trace, token_centred, smooth)


@method("HiResCAM", {"activations", "patch_gradient"}, signed=True, inner=True)
def hirescam(trace: Trace, *, smooth: NotNegative = 0.0) -> Float[Tensor, "k rows columns"]:
    """HiResCAM, also called elementwise Grad-CAM: sum_d g_pd F_pd, every patch with its own gradient.

    Source: Draelos & Carin 2020, arXiv:2011.08891.
    Departures: the optional ReLU is left to the view (option `threshold`); `smooth` as in `gradcam`.
    At a layer that is read only through a LayerNorm the map is zero except for rounding; a warning reports it.
    Range: unbounded. Sign: signed; the map sums to <F, g>.
    Cost: one backward pass from the score to the layer per target; no shortcut.
    """
    return smoothed(_of_patches(trace, lambda features, gradient: (features * gradient).sum(-1)), smooth)


@method("LayerCAM", {"activations", "patch_gradient"}, signed=True)
def layercam(trace: Trace, *, smooth: NotNegative = 0.0) -> Float[Tensor, "k rows columns"]:
    """LayerCAM: sum_d (g_pd)+ F_pd.

    Source: Jiang et al. 2021, doi:10.1109/TIP.2021.3089943, eq. 4-6.
    Departures: the final ReLU is left to the view (option `threshold`); `smooth` as in `gradcam`.
    Range: unbounded. Sign: signed, since features that do not follow a ReLU may be negative.
    Cost: as `hirescam`.
    """
    return smoothed(_of_patches(trace, lambda features, gradient: (features * gradient.clamp(min=0)).sum(-1)), smooth)


@method("Grad-CAM++", {"activations", "patch_gradient"}, signed=True)
def gradcam_pp(trace: Trace, *, smooth: NotNegative = 0.0, eps: NotNegative = 0.0) -> Float[Tensor, "k rows columns"]:
    """Grad-CAM++: sum_d w_d F_pd with w_d = sum_p alpha_pd (g_pd)+ and
    alpha_pd = g_pd^2 / (2 g_pd^2 + S_d g_pd^3), S_d = sum_q F_qd.

    Source: Chattopadhay et al. 2018, arXiv:1710.11063, eq. 19 (the score passed through exp).
    Departures: the factor exp(score) of the weights, one number per map, is left out; 0/0 = 0; the final ReLU is left
    to the view (option `threshold`); `smooth` as in `gradcam`. `eps` is added to the denominator of alpha: 0 is the
    paper's, the published implementation has 1e-6, which exceeds g^2 for gradients below 1e-3 and changes the map.
    Limits: the derivation assumes features that follow a ReLU and a score that is piecewise linear in them. Otherwise
    S_d may be negative: alpha then leaves [0, 1/2] and has a pole at S_d g_pd = -2.
    Range: unbounded. Sign: signed as `gradcam`.
    Cost: as `hirescam`.
    """
    return smoothed(_of_patches(trace, lambda features, gradient: _gradcam_pp(features, gradient, eps)), smooth)


def _gradcam_pp(
    features: Float[Tensor, "k rows columns D"], gradient: Float[Tensor, "k rows columns D"], eps: float
) -> Float[Tensor, "k rows columns"]:
    # Numerator and denominator are divided by g^2, which underflows in float32 for small gradients.
    below = 2 + features.sum((1, 2), keepdim=True) * gradient
    if eps:
        below = below + eps / gradient**2
    kept = (gradient > 0) & (below != 0)
    weights = torch.where(kept, gradient / torch.where(kept, below, 1), 0).sum((1, 2))
    return einsum(features, weights, "k r c d, k d -> k r c")


def _of_patches(trace: Trace, cam: Callable[[Tensor, Tensor], Tensor]) -> Float[Tensor, "k rows columns"]:
    """The map cam(features, gradient); of a difference of two sequences' scores, the sum of the maps of both."""
    maps = cam(trace.activations(), trace.patch_gradient())
    if trace.compares:
        maps = maps + cam(trace.activations(other=True), trace.patch_gradient(other=True))
    return maps


def weighted_features(trace: Trace, token_centred: bool, smooth: float) -> Float[Tensor, "k rows columns"]:
    """Return the Grad-CAM map sum_d w_d F_pd (k, rows, columns), w_d the mean over patches of the gradient."""
    patches = trace.grid[0] * trace.grid[1]
    maps = trace.weighted(trace.pooled_gradient() / patches, centred=token_centred)
    if trace.compares:
        # The score is a difference of two sequences' scores: the features of each with their own gradient.
        maps = maps + trace.weighted(trace.pooled_gradient(other=True) / patches, centred=token_centred, other=True)
    return smoothed(maps, smooth)


def smoothed(maps: Float[Tensor, "k rows columns"], sigma: float) -> Float[Tensor, "k rows columns"]:
    """Return the maps blurred by a Gaussian of `sigma` patches, with mirrored edges; 0 leaves them unchanged."""
    if sigma == 0:
        return maps
    for axis in (1, 2):
        # Reflection padding must be smaller than the map.
        radius = min(math.ceil(3 * sigma), maps.shape[axis] - 1)
        x = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
        kernel = torch.exp(-0.5 * (x / sigma) ** 2)
        rows = rearrange(maps.movedim(axis, -1), "k other n -> (k other) 1 n")
        rows = F.conv1d(F.pad(rows, (radius, radius), mode="reflect"), (kernel / kernel.sum())[None, None])
        maps = rearrange(rows, "(k other) 1 n -> k other n", k=maps.shape[0]).movedim(-1, axis)
    return maps
