"""Record attention weights during a forward pass, for any attention implementation, optionally with gradients.

Two kinds of modules are supported. Modules that call the attention interface of transformers call a recording
implementation during the pass. Modules with an argument `output_attentions` are called with it set, and the weights are
removed from their output unless the caller requested them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from grounding.core.errors import ModelError

IMPLEMENTATION = "grounding_recorded"
# Options of attention functions that the recording implementation does not support.
OTHER_ATTENTION = ("position_bias", "softcap", "s_aux")
SWITCH = "output_attentions"
# Called with a module and its weights; returns the weights with which the pass continues.
AttentionHandler = Callable[[nn.Module, Tensor], Tensor]
_handler: ContextVar[AttentionHandler | None] = ContextVar("attention_handler", default=None)


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
    """Eager attention with the same operations as in transformers; the weights pass through the active handler."""
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
    handle = _handler.get()
    if handle is not None:
        weights = handle(module, weights)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(IMPLEMENTATION, _recorded_attention)
# Without a mask function of its own, causal and padding masks would be left out silently.
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


@contextlib.contextmanager
def record_attention(
    model: nn.Module, modules: Mapping[nn.Module, bool], handle: AttentionHandler, begin: AttentionHandler
) -> Iterator[None]:
    """Inside the block `handle` is called with the weights of `modules` (module -> whether their gradient is recorded).

    The weights of a module with an argument `output_attentions` cannot be replaced, so that its graph has to begin at
    its input: `begin` is called with the module and that input, if its gradient is recorded. The model is restored
    afterwards.
    """
    with contextlib.ExitStack() as stack:
        switched = {module for module in modules if _has_switch(module)}
        for module in switched:
            stack.enter_context(_switched_on(module, handle, begin if modules[module] else None))
        if switched != modules.keys():
            stack.enter_context(_implementation(model))
            token = _handler.set(handle)
            stack.callback(_handler.reset, token)
        yield


def _has_switch(module: nn.Module) -> bool:
    """Whether a module computes its weights without the interface and has an argument to return them."""
    own = inspect.unwrap(type(module).forward)
    calls_interface = "ALL_ATTENTION_FUNCTIONS" in own.__globals__
    return SWITCH in inspect.signature(own).parameters and not calls_interface


@contextlib.contextmanager
def _switched_on(module: nn.Module, handle: AttentionHandler, begin: AttentionHandler | None) -> Iterator[None]:
    """Inside the block the module returns its weights to `handle`; its caller gets the output that it requested."""
    requested: list[bool] = []

    def before(_module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        bound = inspect.signature(module.forward).bind(*args, **keywords)
        requested.append(bool(bound.arguments.get(SWITCH)))
        bound.arguments[SWITCH] = True
        if begin is not None:
            name = next(iter(bound.arguments))
            bound.arguments[name] = begin(module, bound.arguments[name])
        return bound.args, bound.kwargs

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        index = _index_of_weights(output)
        if index is None:
            return output
        handle(module, output[index])
        return output if requested.pop() else _without(output, index)

    with contextlib.ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after, prepend=True).remove)
        yield


def _index_of_weights(output: Any) -> int | None:
    """The index of the weights (B, H, Q, S) in a module's output: the first later part with four axes."""
    if not isinstance(output, tuple):
        return None
    return next((i for i, part in enumerate(output) if i and isinstance(part, Tensor) and part.ndim == 4), None)


def _without(output: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    """The output with None in place of the weights, as most families return it without `output_attentions`."""
    return output[:index] if index == len(output) - 1 and index > 1 else (*output[:index], None, *output[index + 1 :])


@contextlib.contextmanager
def _implementation(model: nn.Module) -> Iterator[None]:
    """Inside the block all configurations of the model select the recording implementation; then they are restored."""
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
