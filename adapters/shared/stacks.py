"""What vision transformers have in common: their stack is found in the model, not hard-coded."""

from __future__ import annotations

from torch import nn

from grounding.adapter.structure import Stack
from grounding.core.errors import ModelError

# What enters a block's attention, and what computes its weights, by the names the families give them.
_INPUTS = ("layer_norm1", "layernorm_before", "norm1")
_ATTENTION = ("self_attn", "attention.attention", "attention")


def find_stack(model: nn.Module, prefix: str) -> Stack:
    """The attention blocks below `prefix`: the longest ModuleList there. Raises ModelError where there is none."""
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


def _child(block: nn.Module, names: tuple[str, ...]) -> str | None:
    known = dict(block.named_modules())
    return next((name for name in names if name in known), None)


# Paths below a block, by the names the families give them: TrOCR and BART; BERT and RoBERTa; GPT-2.
_AMONG = ("self_attn", "attention.self", "attn")


_ACROSS = ("encoder_attn", "crossattention.self", "crossattention")


def decoder_stacks(model: nn.Module, prefix: str) -> dict[str, Stack]:
    """The stacks `decoder` and `cross` below `prefix`. Raises ModelError where there are no such blocks."""
    for path, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and len(module):
            among, across = _below(module[0], _AMONG), _below(module[0], _ACROSS)
            if among and across:
                blocks = tuple(f"{path}.{i}" for i in range(len(module)))
                return {
                    "decoder": Stack(blocks, attention=tuple(f"{b}.{among}" for b in blocks)),
                    "cross": Stack(blocks, attention=tuple(f"{b}.{across}" for b in blocks)),
                }
    raise ModelError(f"{type(model).__name__}.{prefix} has no blocks with cross-attention that could be recorded")


def _below(block: nn.Module, paths: tuple[str, ...]) -> str | None:
    known = dict(block.named_modules())
    return next((path for path in paths if path in known), None)
