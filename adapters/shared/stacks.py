"""Find the attention stacks of transformer encoders and decoders in a model."""

from __future__ import annotations

from torch import nn

from grounding.adapter.structure import Stack
from grounding.core.errors import ModelError

# Paths below an encoder block: the norm before its attention, and the module that computes the attention weights.
_INPUTS = ("layer_norm1", "layernorm_before", "norm1")
_ATTENTION = ("self_attn", "attention.attention", "attention")
# Paths below a decoder block of TrOCR and BART; BERT and RoBERTa; GPT-2: self-attention and cross-attention.
_SELF = ("self_attn", "attention.self", "attn")
_CROSS = ("encoder_attn", "crossattention.self", "crossattention")


def find_stack(model: nn.Module, prefix: str) -> Stack:
    """The attention blocks below `prefix`, the longest ModuleList there. Raises ModelError if there are none."""
    lists = {
        path: module
        for path, module in model.get_submodule(prefix).named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and len(module) and _child(module[0], _ATTENTION)
    }
    if not lists:
        raise ModelError(f"{type(model).__name__}.{prefix} has no attention blocks that could be recorded")
    path = max(lists, key=lambda p: len(lists[p]))
    blocks = tuple(f"{path}.{i}" for i in range(len(lists[path])))
    entry, attention = _child(lists[path][0], _INPUTS), _child(lists[path][0], _ATTENTION)
    return Stack(
        blocks=blocks,
        inputs=tuple(f"{block}.{entry}" for block in blocks) if entry else (),
        attention=tuple(f"{block}.{attention}" for block in blocks),
    )


def decoder_stacks(model: nn.Module, prefix: str) -> dict[str, Stack]:
    """The stacks `decoder` and `cross` below `prefix`, over text sequences. In the last block each position is read by
    itself. Raises ModelError if there are no such blocks."""
    for path, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and len(module):
            own, cross = _child(module[0], _SELF), _child(module[0], _CROSS)
            if own and cross:
                blocks = tuple(f"{path}.{i}" for i in range(len(module)))
                return {
                    name: Stack(blocks, (), tuple(f"{block}.{child}" for block in blocks), "sequence", True)
                    for name, child in (("decoder", own), ("cross", cross))
                }
    raise ModelError(f"{type(model).__name__}.{prefix} has no blocks with cross-attention that could be recorded")


def _child(block: nn.Module, paths: tuple[str, ...]) -> str | None:
    known = dict(block.named_modules())
    return next((path for path in paths if path in known), None)
