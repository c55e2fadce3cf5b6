"""Taps: what one forward pass leaves behind, recorded without leaving a trace on the model.

The pass runs without gradients up to the first place where one is wanted. There the recorder cuts: the tensor is
detached, made a leaf, and gradients are switched on, so that nothing before it is ever differentiated. Everything
wanted later is simply recorded where it stands, on the graph that grew from the cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grounding.adapter.attention import record_attention
from grounding.core.errors import LayerError, ModelError

LAYERNORM_RULE = "layernorm"
# One recorder at a time on a model: threads wait for each other, or one would restore the other's state.
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_registering = Lock()


class Recorder(contextlib.AbstractContextManager["Recorder"]):
    """Records layer outputs and attention weights of one forward pass made inside `with`.

    Parameters
    ----------
    model: the user's model. Inside the block it is in eval mode with frozen parameters; afterwards (also after an
        error) modes, `requires_grad`, hooks, attention implementations and the random state are as before.
    taps: module path -> whether its gradient is wanted.
    attention: path of an attention module -> whether the gradient of its weights is wanted.
    rule: a backward rule. `layernorm`: every LayerNorm's standard deviation counts as a constant in the backward pass
        (Ali et al. 2022, conservative propagation); values of the forward pass are the same to the bit.

    After the pass `outputs[path]` is a layer's output tensor and `weights[path]` the attention (B, H, Q, S).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, bool] | None = None,
        attention: Mapping[str, bool] | None = None,
        rule: str | None = None,
    ) -> None:
        self.model = model
        self.layers = dict(layers or {})
        self.attention = dict(attention or {})
        if rule not in (None, LAYERNORM_RULE):
            raise ValueError(f"unknown backward rule {rule!r} (there is: {LAYERNORM_RULE})")
        self.rule = rule
        self.outputs: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        with contextlib.ExitStack() as stack:
            with _registering:
                lock = _locks.setdefault(self.model, RLock())
            stack.enter_context(lock)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(random_state(self.model))
            stack.enter_context(_frozen(self.model))
            for path, gradient in self.layers.items():
                module = find_module(self.model, path)
                stack.enter_context(_hook(module, lambda out, p=path, g=gradient: self._take_output(p, out, g)))
            if self.rule:
                for norm in (module for module in self.model.modules() if isinstance(module, nn.LayerNorm)):
                    handle = norm.register_forward_hook(_constant_deviation, prepend=True)
                    stack.callback(handle.remove)
            self._modules = {find_module(self.model, path): path for path in self.attention}
            wanted = {module: self.attention[path] for module, path in self._modules.items()}
            if wanted:
                stack.enter_context(
                    record_attention(self.model, wanted, self._take_attention, lambda _module, x: _cut(x))
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """Raise ModelError where something that was asked for never ran, LayerError likewise for a tap."""
        for path in self.layers:
            if path not in self.outputs:
                raise LayerError(f"layer {path!r} took no part in the forward pass; see --list-layers")
        for path in self.attention:
            if path not in self.weights:
                raise ModelError(
                    f"the attention of {path!r} could not be recorded: {type(self.model).__name__} computes it "
                    "in a way that exposes no weights"
                )

    def _take_attention(self, module: nn.Module, weights: Tensor) -> Tensor:
        """Record the weights of a wanted module; return what the pass goes on with."""
        path = self._modules.get(module)
        if path is None:
            return weights
        if path in self.weights:
            raise ModelError(f"attention module {path!r} ran twice in one pass: its weights would be ambiguous")
        self.weights[path] = weights = _cut(weights) if self.attention[path] else weights
        return weights

    def _take_output(self, path: str, output: Any, gradient: bool) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        if not isinstance(tensor, Tensor):
            raise LayerError(f"layer {path!r} returns {type(tensor).__name__}, no tensor: it cannot be a tap")
        if path in self.outputs:
            raise LayerError(f"layer {path!r} ran twice in one pass: its output would be ambiguous")
        self.outputs[path] = tensor = _cut(tensor) if gradient else tensor
        # A copy goes on, so that an in-place operation behind the tap cannot overwrite what was recorded.
        return (tensor.clone(), *output[1:]) if isinstance(output, tuple) else tensor.clone()


def _constant_deviation(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """The output of a LayerNorm with the gradient it has when its standard deviation is a constant."""
    assert isinstance(norm, nn.LayerNorm)
    if not torch.is_grad_enabled():
        return output
    linear = _normed(norm, args[0], _normed_axes(norm, args[0], output))
    return output.detach() + (linear - linear.detach())


def _normed(norm: nn.LayerNorm, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The output without its bias, the deviation off the graph."""
    # Squares of half-precision features overflow.
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    deviation = (wide.var(axes, correction=0, keepdim=True) + norm.eps).sqrt().to(x.dtype)
    linear = (x - x.mean(axes, keepdim=True)) / deviation
    return linear if norm.weight is None else linear * _along(norm.weight, axes)


def _normed_axes(norm: nn.LayerNorm, x: Tensor, output: Tensor) -> tuple[int, ...]:
    """The axes that are normalised: the last ones, or in a variant for maps (B, D, rows, columns) that of the channels.

    Raises ModelError for a variant that does something else.
    """
    last = tuple(range(-len(norm.normalized_shape), 0))
    if type(norm).forward is nn.LayerNorm.forward:
        return last
    for axes in (last, (-3,)) if x.ndim == 4 else (last,):
        if tuple(x.shape[i] for i in axes) == tuple(norm.normalized_shape):
            found = _normed(norm, x.detach(), axes)
            found = found if norm.bias is None else found + _along(norm.bias, axes)
            if torch.allclose(found.float(), output.detach().float(), rtol=0.02, atol=0.02):
                return axes
    raise ModelError(f"the LN-rule cannot follow a {type(norm).__name__}: it is no LayerNorm over channels")


def _along(parameter: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A parameter of a norm over these axes, shaped for its input."""
    return parameter[:, None, None] if axes == (-3,) else parameter


def _cut(tensor: Tensor) -> Tensor:
    """The tensor on a graph: as it is where one has begun before it, else as the leaf that begins it."""
    torch.set_grad_enabled(True)
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path. Raises LayerError naming the nearest existing parent and its children."""
    module, walked = model, ""
    for name in path.split("."):
        child = dict(module.named_children()).get(name)
        if child is None:
            children = ", ".join(n for n, _ in module.named_children()) or "no children"
            raise LayerError(
                f"{type(model).__name__} has no layer {path!r}: {walked or 'it'} has {children} (see --list-layers)"
            )
        module, walked = child, f"{walked}.{name}" if walked else name
    return module


@contextlib.contextmanager
def _hook(module: nn.Module, take: Any) -> Iterator[None]:
    # First in line: transformers installs capture hooks of its own, which must see what the pass goes on with.
    handle = module.register_forward_hook(lambda _module, _args, out: take(out), prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter on the graph; each module and parameter gets its own state back.

    Raises ModelError for parameters that no gradient can pass.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} was made under torch.inference_mode(), where gradients cannot pass it"
        )
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)


@contextlib.contextmanager
def random_state(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Torch's random state, of the CPU and of the model's device, is the same after the block as before.

    Inside, both start from `seed` where one is given; no other device is touched.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield
