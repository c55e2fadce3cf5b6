"""The LN-rule: a backward rule under which the deviation of every LayerNorm and RMSNorm is a constant.

Source: conservative propagation for transformers (Ali et al. 2022, arXiv:2202.07304), without its rule for attention.
With mu and sigma the mean and the standard deviation of x, xhat = (x - mu) / sigma and g the weight of the norm, a
gradient G at the output of a LayerNorm becomes at the input

    true gradient    (g G - mean(g G) - xhat mean(xhat g G)) / sigma
    LN-rule          (g G - mean(g G)) / sigma

and of an RMSNorm, with sigma the root mean square of x and xhat = x / sigma,

    true gradient    (g G - xhat mean(xhat g G)) / sigma
    LN-rule          g G / sigma

The forward pass is unchanged. GroupNorm and BatchNorm keep their true gradients.

Many libraries write their own norms. Such a module is recognised by what it computes of a small known input: whether
it subtracts the mean, over which axes it normalises, and which of its parameters is weight, weight - 1 or bias.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grounding.core.errors import ModelError

LAYERNORM_RULE = "layernorm"
LAST_AXIS = (-1,)
# The axis of the channels in maps (B, D, rows, columns).
CHANNEL_AXIS = (-3,)
# Of norms that keep their epsilon in no attribute.
_EPSILONS = (1e-6, 1e-5, 1e-8, 1e-12, 0.0)
# Relative to outputs of size 1: rounding of half precision is smaller, another formula's difference is not.
_AGREEMENT = 0.02


@dataclass(frozen=True)
class _Form:
    """What a norm computes: (x - mean) / sqrt(mean square of that + epsilon) * (weight + offset) + bias.

    `axes`: over which the means are taken. `centred`: whether the mean is subtracted. `weight`, `bias`: names of
    parameters, None without one. `epsilon`: name of an attribute, or the number where there is none.
    """

    axes: tuple[int, ...]
    centred: bool
    weight: str | None
    offset: float
    bias: str | None
    epsilon: str | float


# By module, then by the axes and the shape of the known input; None: it computes something else.
_forms: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], _Form | None]] = WeakKeyDictionary()


def is_norm(module: nn.Module) -> bool:
    """Whether the LN-rule concerns a module: a LayerNorm, an RMSNorm, or one that computes the same or is named so.

    A module that is named so and computes something else raises ModelError where it runs (`replace_gradient`).
    """
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    if next(module.children(), None) is not None:
        return False
    name = type(module).__name__.lower().replace("_", "")
    return "layernorm" in name or "rmsnorm" in name or (_may_be_norm(module, name) and _by_its_width(module))


def layernorm(norm: nn.Module, x: Float[Tensor, "*batch D"], rule: str | None) -> Float[Tensor, "*batch D"]:
    """The output of a norm over the last axis, differentiable under a backward `rule` (None: as the module).

    Raises ModelError for a module that is neither LayerNorm nor RMSNorm.
    """
    if rule is None:
        return norm(x)
    form = _form(norm, x)
    return _with_bias(norm, _scaled(norm, x, form), form)


def replace_gradient(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a norm (`is_norm`): the same output, with the gradient of the LN-rule.

    Raises ModelError for a module that computes something else than a LayerNorm or RMSNorm over the last axes or the
    channels.
    """
    if not torch.is_grad_enabled():
        return output
    if len(args) != 1 or not isinstance(args[0], Tensor):
        raise _refused(norm)
    linear = _scaled(norm, args[0], _form(norm, args[0])).to(output.dtype)
    return output.detach() + (linear - linear.detach())


def _scaled(norm: nn.Module, x: Tensor, form: _Form) -> Tensor:
    """The output of a norm without its bias, its deviation off the graph."""
    # Squares of half-precision features overflow.
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    squares = wide.var(form.axes, correction=0, keepdim=True) if form.centred else _mean(wide.square(), form)
    deviation = (squares + _epsilon(norm, x, form.epsilon)).sqrt().to(x.dtype)
    linear = (x - _mean(x, form) if form.centred else x) / deviation
    if form.weight is None:
        return linear
    weight = getattr(norm, form.weight)
    return linear * _along(weight + form.offset if form.offset else weight, form)


def _mean(x: Tensor, form: _Form) -> Tensor:
    return x.mean(form.axes, keepdim=True)


def _epsilon(norm: nn.Module, x: Tensor, epsilon: str | float) -> float:
    if not isinstance(epsilon, str):
        return epsilon
    found = getattr(norm, epsilon)
    return torch.finfo(x.dtype).eps if found is None else float(found)


def _with_bias(norm: nn.Module, scaled: Tensor, form: _Form) -> Tensor:
    return scaled if form.bias is None else scaled + _along(getattr(norm, form.bias), form)


def _along(parameter: Tensor, form: _Form) -> Tensor:
    """A parameter of a norm, shaped to broadcast over the input of the norm."""
    return parameter[:, None, None] if form.axes == CHANNEL_AXIS else parameter


def _form(norm: nn.Module, x: Tensor) -> _Form:
    """What a norm computes of inputs like x. Raises ModelError if it is neither LayerNorm nor RMSNorm."""
    for kind in (nn.LayerNorm, nn.RMSNorm):
        if isinstance(norm, kind) and type(norm).forward is kind.forward:
            bias = "bias" if getattr(norm, "bias", None) is not None else None
            weight = None if norm.weight is None else "weight"
            axes = tuple(range(-len(norm.normalized_shape), 0))
            return _Form(axes, kind is nn.LayerNorm, weight, 0.0, bias, "eps")
    shapes = [(LAST_AXIS, (1, *[2] * (x.ndim - 1 - _rank(norm)), *x.shape[-_rank(norm) :]))]
    if x.ndim == 4:
        shapes.append((CHANNEL_AXIS, (1, x.shape[1], 2, 3)))
    for axes, shape in shapes:
        if (found := _known(norm, axes, shape)) is not None:
            return found
    raise _refused(norm)


def _refused(norm: nn.Module) -> ModelError:
    return ModelError(
        f"the LN-rule cannot follow a {type(norm).__name__}: it is no LayerNorm or RMSNorm over channels; "
        "use a method without the rule"
    )


def _may_be_norm(module: nn.Module, name: str) -> bool:
    """Whether it is worth finding out what a module without children computes, which costs a few small calls."""
    if type(module).__module__.startswith("torch.nn."):
        return False
    shapes = {parameter.shape for parameter in module.parameters()}
    return len(shapes) == 1 and all(len(shape) == 1 for shape in shapes) if shapes else "norm" in name


def _by_its_width(module: nn.Module) -> bool:
    """Whether a module computes a norm of inputs as wide as its parameters."""
    [width] = next(module.parameters(), torch.zeros(8)).shape
    return any(_known(module, *a) is not None for a in ((LAST_AXIS, (1, 2, width)), (CHANNEL_AXIS, (1, width, 2, 3))))


def _rank(norm: nn.Module) -> int:
    """The number of axes of the parameters of a norm."""
    return max((p.ndim for p in norm.parameters(recurse=False)), default=1)


def _known(norm: nn.Module, axes: tuple[int, ...], shape: tuple[int, ...]) -> _Form | None:
    found = _forms.setdefault(norm, {})
    if (*axes, *shape) not in found:
        found[(*axes, *shape)] = _measured(norm, axes, shape)
    return found[(*axes, *shape)]


@torch.no_grad()
def _measured(norm: nn.Module, axes: tuple[int, ...], shape: tuple[int, ...]) -> _Form | None:
    """The form that reproduces what a norm computes of known inputs of a shape, None if there is none."""
    # A copy with other parameters: where a weight is 1 or a bias 0, several forms would agree.
    twin = copy.copy(norm)
    parameters = {name: nn.Parameter(_waves(p.shape, 1.3 + i, 1.5)) for i, (name, p) in enumerate(_own(norm).items())}
    twin.__dict__["_parameters"] = parameters | dict.fromkeys(set(norm._parameters) - set(parameters))
    twin.__dict__["_buffers"] = {name: None if b is None else b.cpu().clone() for name, b in norm._buffers.items()}
    # Not centred, no two rows alike; so large that no epsilon shows.
    x = _waves(shape, 0.7, 0.5)
    large = 1000 * x
    output = _output(twin, large)
    for form in _candidates(norm, axes, shape) if output is not None else ():
        if not _agrees(twin, large, output, form):
            continue
        epsilons: list[str | float] = [*_named_epsilons(norm), *_EPSILONS]
        for epsilon in epsilons:
            # Inputs as small as the square root of epsilon: there it shows.
            small = x * max(_epsilon(norm, x, epsilon), 1e-14) ** 0.5
            if _agrees(twin, small, _output(twin, small), replace(form, epsilon=epsilon)):
                return replace(form, epsilon=epsilon)
    return None


def _waves(shape: tuple[int, ...], frequency: float, offset: float) -> Tensor:
    """Known numbers that are not alike, without a draw from the random state."""
    return torch.arange(torch.Size(shape).numel()).mul(frequency).sin().add(offset).float().reshape(shape)


def _own(norm: nn.Module) -> dict[str, nn.Parameter]:
    return dict(norm.named_parameters(recurse=False, remove_duplicate=False))


def _candidates(norm: nn.Module, axes: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[_Form]:
    own = _own(norm).items()
    fits = [name for name, p in own if p.shape == (shape[-p.ndim :] if axes == LAST_AXIS else shape[1:2])]
    weights: list[tuple[str | None, float]] = [(None, 0.0), *((name, offset) for name in fits for offset in (0.0, 1.0))]
    for (weight, offset), bias, centred in itertools.product(weights, [None, *fits], (True, False)):
        if weight is None or weight != bias:
            yield _Form(axes, centred, weight, offset, bias, _EPSILONS[0])


def _named_epsilons(norm: nn.Module) -> list[str]:
    """The attributes of a norm that may be its epsilon: small numbers, or None for the smallest of the type."""
    small = [name for name, value in vars(norm).items() if isinstance(value, float) and 0 <= value < 0.1]
    return small + [name for name in ("eps", "epsilon", "variance_epsilon") if getattr(norm, name, 0) is None]


def _output(norm: nn.Module, x: Tensor) -> Tensor | None:
    """What a norm computes, by the definition of its class: hooks and wrappers are of the pass, not of this."""
    try:
        output = type(norm).forward(norm, x)
    except Exception:  # noqa: BLE001 - whatever a module of another library raises, it computes something else
        return None
    return output if isinstance(output, Tensor) and output.shape == x.shape else None


def _agrees(norm: nn.Module, x: Tensor, output: Tensor | None, form: _Form) -> bool:
    expected = _with_bias(norm, _scaled(norm, x, form), form)
    return output is not None and torch.allclose(output.float(), expected, rtol=_AGREEMENT, atol=_AGREEMENT)
