"""Record attention weights during a forward pass, for any attention implementation, optionally with gradients.

Four kinds of modules are supported:

- modules that call the attention interface of transformers (`grounding.adapter.attention_interface`);
- `nn.MultiheadAttention` (`grounding.adapter.multihead_attention`);
- modules with an argument `output_attentions`: they are called with it set, and the weights are removed from their
  output unless the caller requested them;
- modules that compute weights always and pass them through an `nn.Dropout` of their own (BLIP, GIT): a hook on the
  dropout, which does nothing in eval mode.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grounding.adapter.attention_interface import calls_interface, imports_interface, record_interface
from grounding.adapter.multihead_attention import AttentionHandler, record_multihead

SWITCH = "output_attentions"
# Called with a module and its input; returns the input with which the pass continues.
Begin = Callable[[nn.Module, Tensor], Tensor]


@contextlib.contextmanager
def record_attention(
    model: nn.Module, modules: Mapping[nn.Module, bool], handle: AttentionHandler, begin: Begin
) -> Iterator[None]:
    """Inside the block `handle` is called with the weights of `modules` (module -> whether their gradient is recorded).

    The pass continues with the weights that `handle` returns. Only those of a module with an argument
    `output_attentions` cannot be replaced, so that its graph has to begin at its input: `begin` is called with the
    module and that input, if its gradient is recorded. The model is restored afterwards. Raises ModelError for
    attention that cannot be recorded, as far as it is known before the pass.
    """
    with contextlib.ExitStack() as stack:
        by_interface: dict[nn.Module, bool] = {}
        for module, gradient in modules.items():
            kind = type(module)
            dropouts = [child for child in module.children() if isinstance(child, nn.Dropout)]
            if isinstance(module, nn.MultiheadAttention):
                stack.enter_context(record_multihead(module, handle))
            elif calls_interface(kind):
                by_interface[module] = gradient
            elif SWITCH in inspect.signature(inspect.unwrap(kind.forward)).parameters:
                stack.enter_context(_switched_on(module, handle, begin if gradient else None))
            else:
                for dropout in dropouts:
                    stack.enter_context(_through_dropout(module, dropout, handle))
                if imports_interface(kind) or not dropouts:
                    by_interface[module] = gradient
        if by_interface:
            stack.enter_context(record_interface(model, by_interface, handle))
        yield


@contextlib.contextmanager
def _through_dropout(module: nn.Module, dropout: nn.Dropout, handle: AttentionHandler) -> Iterator[None]:
    """Inside the block attention weights that the module passes through its dropout pass through `handle`."""

    def after(_dropout: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return handle(module, output) if _are_weights(output) else output

    hook = dropout.register_forward_hook(after, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def _are_weights(x: Tensor) -> bool:
    """Whether a tensor (B, H, Q, S) contains attention weights: the sum over keys is 1, NaN left to its own error."""
    if x.ndim != 4:
        return False
    # In half precision a sum of many rounded weights is off by 1e-2.
    return not bool(((x.sum(-1, dtype=torch.float32) - 1).abs() > 0.1).any())


@contextlib.contextmanager
def _switched_on(module: nn.Module, handle: AttentionHandler, begin: Begin | None) -> Iterator[None]:
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
