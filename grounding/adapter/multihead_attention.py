"""Record the attention weights of `nn.MultiheadAttention` during a forward pass, with gradients at the weights.

torch computes these weights in fused kernels, or returns them as a by-product that no gradient reaches. Inside
`record_multihead` the module computes the same output by the formula, so that the pass continues at the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from grounding.core.errors import ModelError

# Called with a module, its weights (B, H, Q, S) and, where they are known, its query (B, H, Q, d) and key (B, H, S, d);
# returns the weights with which the pass continues.
AttentionHandler = Callable[..., Tensor]


@contextlib.contextmanager
def record_multihead(module: nn.MultiheadAttention, handle: AttentionHandler) -> Iterator[None]:
    """Inside the block the weights (B, H, L, S) of the module pass through `handle`; then its forward is restored.

    Raises ModelError, here or in the pass, for a module that computes other attention than the class, for keys without
    a token (`bias_k`, `add_zero_attn`) and for nested tensors.
    """
    name = type(module).__name__
    if "forward" in vars(module) or type(module).forward is not nn.MultiheadAttention.forward:
        raise ModelError(f"the attention of {name} cannot be recorded: its forward method was replaced")
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise ModelError(f"the attention of {name} cannot be recorded: bias_k and add_zero_attn add keys of no token")

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested:
            raise ModelError(
                f"the attention of {name} cannot be recorded with nested tensors: "
                "build its nn.TransformerEncoder with enable_nested_tensor=False"
            )
        if is_causal and attn_mask is None:
            raise ModelError(f"{name} was called with is_causal, a hint about a mask, but without attn_mask")
        batched = query.ndim == 3
        # Inside: (batch, tokens, channels).
        query, key, value = (_batch_first(module, x, batched) for x in (query, key, value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        output, weights = _attention(module, query, key, value, attn_mask, key_padding_mask, handle)
        if batched and not module.batch_first:
            output = output.transpose(0, 1)
        answer = weights.mean(1) if average_attn_weights else weights
        if not batched:
            output, answer = output[0], answer[0]
        return output, answer if need_weights else None

    module.forward = forward  # type: ignore[method-assign]
    # nn.TransformerEncoderLayer calls its attention module only if some module inside it has a hook.
    hook = module.register_forward_hook(lambda _module, _args, _output: None)
    try:
        yield
    finally:
        hook.remove()
        del module.forward


def _batch_first(module: nn.MultiheadAttention, x: Tensor, batched: bool) -> Tensor:
    if not batched:
        return x[None]
    return x if module.batch_first else x.transpose(0, 1)


def _attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    handle: AttentionHandler,
) -> tuple[Tensor, Tensor]:
    """Output (B, L, D) and the recorded weights (B, H, L, S), by the formula of `nn.MultiheadAttention`."""
    batch, heads, length = len(query), module.num_heads, key.shape[1]
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    if module.in_proj_weight is None:
        matrices = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        matrices = module.in_proj_weight.chunk(3)
    q, k, v = (
        nn.functional.linear(x, matrix, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, matrix, bias in zip((query, key, value), matrices, biases, strict=True)
    )
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        # (L, S) for all, or (B * H, L, S).
        logits = logits + _added(mask, logits.dtype).view(1 if mask.ndim == 2 else batch, -1, *mask.shape[-2:])
    if padding is not None:
        logits = logits + _added(padding, logits.dtype).view(batch, 1, 1, length)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)
    weights = handle(module, weights, q, k)
    # As torch does, with the parameters of the output projection: its own forward is never called.
    projection = module.out_proj
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    return nn.functional.linear(mixed, projection.weight, projection.bias), weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as an addend of the logits: True of a boolean mask is a key that may not be attended to."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    if not mask.is_floating_point():
        raise ModelError(f"masks of nn.MultiheadAttention are boolean or floating point, not {mask.dtype}")
    return mask.to(dtype)
