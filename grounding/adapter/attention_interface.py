"""Record the attention weights of modules that call the attention interface of transformers.

During the pass their configurations select the implementation `IMPLEMENTATION`, which computes softmax attention as the
eager functions of transformers do. A model configured with an attention function that is not one of transformers is
refused: the recorded weights would not be its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from grounding.adapter.multihead_attention import AttentionHandler
from grounding.core.errors import ModelError

IMPLEMENTATION = "grounding_recorded"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
# Names of the functions of transformers that compute softmax attention. Others of the library do not: some are sparse.
SOFTMAX_ATTENTION = (
    "eager_attention_forward",
    "eager_paged_attention_forward",
    "sdpa_attention_forward",
    "sdpa_attention_paged_forward",
    "flash_attention_forward",
    "paged_attention_forward",
    "flex_attention_forward",
)
# Packed sequences: the argument with their boundaries, (sequences + 1,), from 0 to the number of tokens.
BOUNDARIES = "cu_seqlens"
_handler: ContextVar[AttentionHandler | None] = ContextVar("attention_handler", default=None)


def _recorded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention with the same operations as in transformers; the weights pass through the active handler.

    `softcap` c replaces the logits x by c tanh(x / c) (as in Gemma 2), `position_bias` is added to them (as in T5),
    both before the mask. `s_aux` (H,) are the logits of attention sinks (as in gpt-oss): one more column of the
    softmax, which is then dropped, so that rows sum to less than 1. Raises ModelError for options of the family's own
    eager function that are none of these.
    """
    if unknown := [name for name in _own_options(type(module)) if options.get(name) is not None]:
        raise ModelError(f"attention with {', '.join(unknown)} cannot be recorded in {type(module).__name__}")
    # Grouped queries: a key head serves several query heads.
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    if position_bias is not None:
        logits = logits + position_bias
    if attention_mask is not None:
        logits = _masked(logits, attention_mask)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1).to(logits.dtype)], -1)
    # In float32 at least, as transformers does; float64 stays what it is.
    weights = logits.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    if s_aux is not None:
        weights = weights[..., :-1]
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    handle = _handler.get()
    if handle is not None:
        weights = handle(module, weights, query, key)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits plus a floating-point mask; True of a boolean mask is a key that may be attended to, as in sdpa."""
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits + mask


AttentionInterface.register(IMPLEMENTATION, _recorded_attention)
# Without a mask function of its own, causal and padding masks would be left out silently.
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
# Options that need no care: masks contain the window, the rest is bookkeeping.
_KNOWN = frozenset(inspect.signature(_recorded_attention).parameters) | {"sliding_window", "is_causal", "kwargs"}


def calls_interface(kind: type[nn.Module]) -> bool:
    """Whether a method of a class of modules calls the attention interface."""
    # Not by the names of its file: some families have classes with and without the interface in one file.
    classes = (base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module)
    functions = (inspect.unwrap(f) for base in classes for f in vars(base).values() if inspect.isfunction(f))
    return any(INTERFACE in function.__code__.co_names for function in functions if inspect.isfunction(function))


def imports_interface(kind: type[nn.Module]) -> bool:
    """Whether the file of a class of modules imports the attention interface."""
    return INTERFACE in _globals(kind)


def _globals(kind: type[nn.Module]) -> dict[str, Any]:
    return getattr(inspect.unwrap(kind.forward), "__globals__", {})


@contextlib.contextmanager
def record_interface(model: nn.Module, modules: Mapping[nn.Module, bool], handle: AttentionHandler) -> Iterator[None]:
    """Inside the block every attention function of the model passes its weights (B, H, Q, S) through `handle`.

    A module of `modules` (module -> whether their gradient is recorded) that calls the interface once for each of
    several packed sequences gives one block-diagonal tensor (1, H, N, N). Raises ModelError if the model is configured
    with an attention function that is not one of transformers.
    """
    refuse_foreign(model)
    with contextlib.ExitStack() as stack:
        packed: dict[nn.Module, _Packed] = {}
        for module, gradient in modules.items():
            if BOUNDARIES in inspect.signature(inspect.unwrap(type(module).forward)).parameters:
                packed[module] = _Packed(module, gradient, handle)
                stack.callback(module.register_forward_pre_hook(packed[module].begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(packed[module].end).remove)

        def take(module: nn.Module, weights: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Tensor:
            return packed[module].take(weights) if module in packed else handle(module, weights, query, key)

        stack.enter_context(_implementation(model))
        token = _handler.set(take)
        stack.callback(_handler.reset, token)
        yield


class _Packed:
    """Assembles the weights of packed sequences, one call of the interface each, to one block-diagonal tensor.

    The tensor is made at the first call, before the values of later ones are known, and filled during the pass. With a
    gradient it is a leaf: each call adds to its weights the difference of a block and the same block off the graph,
    which is zero, so that the gradient of the block is that of the weights.
    """

    def __init__(self, module: nn.Module, gradient: bool, handle: AttentionHandler) -> None:
        self.module, self.gradient, self.handle = module, gradient, handle
        self.boundaries: list[int] = []
        self.calls = 0
        self.values = self.recorded = torch.empty(0)

    def begin(self, _module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found = inspect.signature(self.module.forward).bind(*args, **keywords).arguments.get(BOUNDARIES)
        self.boundaries = [] if found is None else found.tolist()
        self.calls = 0

    def end(self, *_: object) -> None:
        if self.calls and self.calls != len(self.boundaries) - 1:
            raise self._mismatch()

    def take(self, weights: Tensor) -> Tensor:
        # One sequence, or all of them in one call with a mask.
        if len(self.boundaries) <= 2 or weights.shape[-2] == self.boundaries[-1]:
            return self.handle(self.module, weights)
        self.calls += 1
        if self.calls >= len(self.boundaries):
            raise self._mismatch()
        first, last = self.boundaries[self.calls - 1 : self.calls + 1]
        if weights.shape[0] != 1 or weights.shape[2:] != (last - first, last - first):
            raise self._mismatch()
        if self.calls == 1:
            tokens = self.boundaries[-1]
            self.values = weights.new_zeros(1, weights.shape[1], tokens, tokens)
            self.recorded = self.handle(self.module, self.values)
        with torch.no_grad():
            self.values[:, :, first:last, first:last] = weights
        if not self.gradient:
            return weights
        block = self.recorded[:, :, first:last, first:last]
        return weights + (block - block.detach())

    def _mismatch(self) -> ModelError:
        return ModelError(
            f"the attention of {type(self.module).__name__} cannot be recorded: {self.calls} calls seen that are not "
            f"the {len(self.boundaries) - 1} packed sequences of its input"
        )


def refuse_foreign(model: nn.Module) -> None:
    """Raise ModelError if a configuration of the model selects an attention function that is not of transformers."""
    used = {(type(m), getattr(getattr(m, "config", None), "_attn_implementation", None)): None for m in model.modules()}
    for kind, name in used:
        if name not in (None, IMPLEMENTATION) and not _is_softmax(kind, name):
            raise ModelError(
                f"{type(model).__name__} uses the attention implementation {name!r}, whose weights cannot be recorded: "
                "it is not softmax attention of transformers; call model.set_attn_implementation('eager') or choose "
                "methods without attention"
            )


def _is_softmax(kind: type[nn.Module], name: str) -> bool:
    """Whether an implementation is, for a class of modules, a function of transformers that is softmax attention."""
    interface = _globals(kind).get(INTERFACE) or AttentionInterface()
    if name not in interface and name != "paged|eager":
        name = name.removeprefix("paged|")
    function = interface.get(name)
    if function is not None:
        return _is_of_transformers(function)
    eager = _own_eager(kind)
    # A class outside transformers may have an eager function of its own, in its file.
    return name == "eager" and (eager is None or eager.__module__ == kind.__module__ or _is_of_transformers(eager))


def _is_of_transformers(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    home, name = getattr(function, "__module__", None) or "", getattr(function, "__name__", "")
    # By identity: a wrapper made with functools.wraps has the names of what it wraps.
    same = getattr(sys.modules.get(home), name, None) is function
    return same and home.startswith("transformers.") and name.endswith(SOFTMAX_ATTENTION)


def _own_eager(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The eager attention function that the forward method of a class of modules names, if any."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    names = [name for name in code.co_names if name.endswith("eager_attention_forward")] if code else []
    found: Callable[..., Any] | None = _globals(kind).get(names[0]) if names else None
    return found


def _own_options(kind: type[nn.Module]) -> list[str]:
    """Options of the eager function of a class of modules that the recording implementation does not have."""
    eager = _own_eager(kind)
    return [] if eager is None else [name for name in inspect.signature(eager).parameters if name not in _KNOWN]


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
