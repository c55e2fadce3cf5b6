"""The LN-rule: a backward rule under which the standard deviation of every LayerNorm is a constant.

Source: conservative propagation for transformers (Ali et al. 2022, arXiv:2202.07304). With mu and sigma the mean and
the standard deviation of x, xhat = (x - mu) / sigma and g the weight of the norm, a gradient G at the output becomes
at the input

    true gradient    (g G - mean(g G) - xhat mean(xhat g G)) / sigma
    LN-rule          (g G - mean(g G)) / sigma

The forward pass is unchanged.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grounding.core.errors import ModelError

LAYERNORM_RULE = "layernorm"
# The axis of the channels in maps (B, D, rows, columns).
CHANNEL_AXIS = (-3,)


def layernorm(norm: nn.LayerNorm, x: Float[Tensor, "*batch D"], rule: str | None) -> Float[Tensor, "*batch D"]:
    """The output of a LayerNorm over the last axis, differentiable under a backward `rule` (None: as the module)."""
    return norm(x) if rule is None else _with_bias(norm, _scaled(norm, x, (-1,)), (-1,))


def replace_gradient(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """Forward hook of a LayerNorm: the same output, with the gradient of the LN-rule.

    Raises ModelError for a subclass of LayerNorm that normalises over other axes than the last ones or the channels.
    """
    assert isinstance(norm, nn.LayerNorm)
    if not torch.is_grad_enabled():
        return output
    linear = _scaled(norm, args[0], _normalised_axes(norm, args[0], output))
    return output.detach() + (linear - linear.detach())


def _scaled(norm: nn.LayerNorm, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The output of a LayerNorm over `axes` without its bias, its standard deviation off the graph."""
    # Squares of half-precision features overflow.
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    deviation = (wide.var(axes, correction=0, keepdim=True) + norm.eps).sqrt().to(x.dtype)
    linear = (x - x.mean(axes, keepdim=True)) / deviation
    return linear if norm.weight is None else linear * _along(norm.weight, axes)


def _with_bias(norm: nn.LayerNorm, scaled: Tensor, axes: tuple[int, ...]) -> Tensor:
    return scaled if norm.bias is None else scaled + _along(norm.bias, axes)


def _normalised_axes(norm: nn.LayerNorm, x: Tensor, output: Tensor) -> tuple[int, ...]:
    """The axes over which a norm normalises: the last ones, or in a subclass for maps (B, D, rows, columns) the
    channels.

    Raises ModelError for a subclass that does something else.
    """
    last = tuple(range(-len(norm.normalized_shape), 0))
    if type(norm).forward is nn.LayerNorm.forward:
        return last
    for axes in (last, CHANNEL_AXIS) if x.ndim == 4 else (last,):
        if tuple(x.shape[i] for i in axes) == tuple(norm.normalized_shape):
            found = _with_bias(norm, _scaled(norm, x.detach(), axes), axes)
            if torch.allclose(found.float(), output.detach().float(), rtol=0.02, atol=0.02):
                return axes
    raise ModelError(f"the LN-rule cannot follow a {type(norm).__name__}: it is no LayerNorm over channels")


def _along(parameter: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A parameter of a norm over `axes`, shaped to broadcast over the input of the norm."""
    return parameter[:, None, None] if axes == CHANNEL_AXIS else parameter
