"""Class activation maps: patch features of one layer, weighted by what the score's gradient says of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from grounding.adapter.recorder import LAYERNORM_RULE
from grounding.methods.base import method
from grounding.methods.options import NotNegative
from grounding.methods.trace import Trace


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


@method("HiResCAM", {"activations", "patch_gradient"}, signed=True, inner=True)
def hirescam(trace: Trace, *, smooth: NotNegative = 0.0) -> Float[Tensor, "k rows columns"]:
    """Grad-CAM with every patch's own gradient (HiResCAM, Draelos & Carin 2020): sum_d g_pd F_pd, g = d score / d F.

    Also called elementwise Grad-CAM. Raw and signed: their ReLU is optional, here a matter of the view. At a layer that
    is read through a LayerNorm alone it is zero to rounding at every patch, and a warning says so. Cost: one backward
    from the score to the tap per target, never a fast tap.
    """
    return smoothed(_of_patches(trace, lambda features, gradient: (features * gradient).sum(-1)), smooth)


@method("LayerCAM", {"activations", "patch_gradient"}, signed=True)
def layercam(trace: Trace, *, smooth: NotNegative = 0.0) -> Float[Tensor, "k rows columns"]:
    """LayerCAM (Jiang et al. 2021, eq. 4-6): sum_d (g_pd)+ F_pd, g = d score / d F.

    Raw and signed: features that are behind no ReLU may be negative, the paper's final ReLU is a matter of the view.
    Cost: as `hirescam`.
    """
    return smoothed(_of_patches(trace, lambda features, gradient: (features * gradient.clamp(min=0)).sum(-1)), smooth)


@method("Grad-CAM++", {"activations", "patch_gradient"}, signed=True)
def gradcam_pp(trace: Trace, *, smooth: NotNegative = 0.0, eps: NotNegative = 0.0) -> Float[Tensor, "k rows columns"]:
    """Grad-CAM++ (Chattopadhay et al. 2018): sum_d w_d F_pd with w_d = sum_p alpha_pd (g_pd)+, g = d score / d F, and
    alpha_pd = g_pd^2 / (2 g_pd^2 + S_d g_pd^3), S_d = sum_q F_qd (eq. 19: the score passed through exp).

    Departures: the weights' factor exp(score), one number per map, is left out, 0/0 = 0, and `eps` is added to the
    denominator: 0 is the paper's; the published implementation has 1e-6, which outweighs gradients below 1e-3 and then
    changes the map. The derivation takes the features to be behind a ReLU and the score to be piecewise linear in them.
    Elsewhere S_d may be negative: alpha then leaves [0, 1/2] and has a pole at S_d g_pd = -2.

    Raw and signed as Grad-CAM. Cost: as `hirescam`.
    """
    return smoothed(_of_patches(trace, lambda features, gradient: _gradcam_pp(features, gradient, eps)), smooth)


def _gradcam_pp(
    features: Float[Tensor, "k rows columns D"], gradient: Float[Tensor, "k rows columns D"], eps: float
) -> Float[Tensor, "k rows columns"]:
    # Both sides divided by g^2, which float32 cannot hold of a small gradient.
    below = 2 + features.sum((1, 2), keepdim=True) * gradient
    if eps:
        below = below + eps / gradient**2
    kept = (gradient > 0) & (below != 0)
    weights = torch.where(kept, gradient / torch.where(kept, below, 1), 0).sum((1, 2))
    return einsum(features, weights, "k r c d, k d -> k r c")


def _of_patches(trace: Trace, cam: Callable[[Tensor, Tensor], Tensor]) -> Float[Tensor, "k rows columns"]:
    """A map made of features and gradients; of a caption that is compared with another one, the sum over both."""
    maps = cam(trace.activations(), trace.patch_gradient())
    if trace.compares:
        maps = maps + cam(trace.activations(other=True), trace.patch_gradient(other=True))
    return maps


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
