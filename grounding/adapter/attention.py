"""Attention weights out of a running model, whatever implementation it was loaded with; on the graph where asked for.

Two kinds of modules are known. Those that call a function of transformers' attention interface get ours, which hands
the weights over. Those with an `output_attentions` switch of their own are switched on for the call, and what they
give back is taken out of their output again.
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
# Forms of attention that the recorded one does not compute.
OTHER_ATTENTION = ("position_bias", "softcap", "s_aux")
SWITCH = "output_attentions"
# Called with a module and its weights, gives the weights that the pass goes on with.
AttentionHandler = Callable[[nn.Module, Tensor], Tensor]
_taker: ContextVar[AttentionHandler | None] = ContextVar("attention_taker", default=None)


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
    """Eager attention, step for step as in transformers, with the weights handed to the active taker."""
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
    take = _taker.get()
    if take is not None:
        weights = take(module, weights)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(IMPLEMENTATION, _recorded_attention)
# Without its mask function causal and padding masks would vanish silently.
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


@contextlib.contextmanager
def record_attention(
    model: nn.Module, modules: Mapping[nn.Module, bool], take: AttentionHandler, begin: AttentionHandler
) -> Iterator[None]:
    """Inside the block the weights of `modules` (-> whether their gradient is wanted) go through `take`.

    Of a module with a switch the weights cannot be replaced, so that a graph has to begin at its input: `begin` is
    called with the module and that input. Everything is as before afterwards.
    """
    with contextlib.ExitStack() as stack:
        switched = {module for module in modules if _has_switch(module)}
        for module in switched:
            stack.enter_context(_switched_on(module, take, begin if modules[module] else None))
        if switched != modules.keys():
            stack.enter_context(_implementation(model))
            token = _taker.set(take)
            stack.callback(_taker.reset, token)
        yield


def _has_switch(module: nn.Module) -> bool:
    """Whether the module computes its weights itself and has a switch for giving them back."""
    own = inspect.unwrap(type(module).forward)
    calls_interface = "ALL_ATTENTION_FUNCTIONS" in own.__globals__
    return SWITCH in inspect.signature(own).parameters and not calls_interface


@contextlib.contextmanager
def _switched_on(module: nn.Module, take: AttentionHandler, begin: AttentionHandler | None) -> Iterator[None]:
    """The module gives its weights back; its caller sees the output that it asked for."""
    asked: list[bool] = []

    def before(_module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        bound = inspect.signature(module.forward).bind(*args, **keywords)
        asked.append(bool(bound.arguments.get(SWITCH)))
        bound.arguments[SWITCH] = True
        if begin is not None:
            name = next(iter(bound.arguments))
            bound.arguments[name] = begin(module, bound.arguments[name])
        return bound.args, bound.kwargs

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        place = _place_of_weights(output)
        if place is None:
            return output
        take(module, output[place])
        return output if asked.pop() else _without(output, place)

    with contextlib.ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after, prepend=True).remove)
        yield


def _place_of_weights(output: Any) -> int | None:
    """Where in a module's output the weights (B, H, Q, S) are: whichever of its parts has four axes."""
    if not isinstance(output, tuple):
        return None
    return next((i for i, part in enumerate(output) if i and isinstance(part, Tensor) and part.ndim == 4), None)


def _without(output: tuple[Any, ...], place: int) -> tuple[Any, ...]:
    """The output without its weights: None in their place, as most families have it with the switch off."""
    return output[:place] if place == len(output) - 1 and place > 1 else (*output[:place], None, *output[place + 1 :])


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
