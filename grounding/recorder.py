"""Taps: what one forward pass leaves behind, recorded without leaving a trace on the model.

The pass runs without gradients up to the first place where one is wanted. There the recorder cuts: the tensor is
detached, made a leaf, and gradients are switched on, so that nothing before it is ever differentiated. Everything
wanted later is simply recorded where it stands, on the graph that grew from the cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from grounding.errors import LayerError, ModelError

IMPLEMENTATION = "grounding_recorded"
LAYERNORM_RULE = "layernorm"
# Forms of attention that the recorded one does not compute.
OTHER_ATTENTION = ("position_bias", "softcap", "s_aux")
# One recorder at a time on a model: threads wait for each other, or one would restore the other's state.
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_registering = Lock()
_active: ContextVar[Recorder | None] = ContextVar("active_recorder", default=None)


def _recorded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention, step for step as in transformers, with the weights handed to the active recorder."""
    if unknown := [name for name in OTHER_ATTENTION if options.get(name) is not None]:
        raise ModelError(f"attention with {', '.join(unknown)} cannot be recorded in {type(module).__name__}")
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        logits = logits + attention_mask
    # In float32 at least, as transformers does; float64 stays what it is.
    weights = logits.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    recorder = _active.get()
    if recorder is not None:
        weights = recorder.take_attention(module, weights)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(IMPLEMENTATION, _recorded_attention)
# Without its mask function causal and padding masks would vanish silently.
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


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
        taps: Mapping[str, bool] | None = None,
        attention: Mapping[str, bool] | None = None,
        rule: str | None = None,
    ) -> None:
        self.model = model
        self.taps = dict(taps or {})
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
            for path, gradient in self.taps.items():
                module = find_module(self.model, path)
                stack.enter_context(_hook(module, lambda out, p=path, g=gradient: self._take_output(p, out, g)))
            if self.rule:
                for norm in (module for module in self.model.modules() if isinstance(module, nn.LayerNorm)):
                    handle = norm.register_forward_hook(_constant_deviation, prepend=True)
                    stack.callback(handle.remove)
            self._modules = {id(find_module(self.model, path)): path for path in self.attention}
            if self.attention:
                stack.enter_context(_implementation(self.model))
            token = _active.set(self)
            stack.callback(_active.reset, token)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """Raise ModelError where something that was asked for never ran, LayerError likewise for a tap."""
        for path in self.taps:
            if path not in self.outputs:
                raise LayerError(f"layer {path!r} took no part in the forward pass; see --list-layers")
        for path in self.attention:
            if path not in self.weights:
                raise ModelError(
                    f"the attention of {path!r} could not be recorded: {type(self.model).__name__} computes it "
                    "in a way that exposes no weights"
                )

    def take_attention(self, module: nn.Module, weights: Tensor) -> Tensor:
        """Record the weights of a wanted module; return what the pass goes on with."""
        path = self._modules.get(id(module))
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
    x, axes = args[0], tuple(range(-len(norm.normalized_shape), 0))
    deviation = (x.detach().var(axes, correction=0, keepdim=True) + norm.eps).sqrt()
    linear = (x - x.mean(axes, keepdim=True)) / deviation
    linear = linear if norm.weight is None else linear * norm.weight
    return output.detach() + (linear - linear.detach())


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
    """Eval mode and no parameter on the graph; each module and parameter gets its own state back."""
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
def _implementation(model: nn.Module) -> Iterator[None]:
    """Every configuration in the model points at the recorded attention; each gets its own setting back."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    # Parents come first in modules(), and setting a parent may set its parts: restoring in the same order is exact.
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


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
