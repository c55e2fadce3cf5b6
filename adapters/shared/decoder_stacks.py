"""What text decoders have in common: blocks with an attention among text positions and one on the picture."""

from __future__ import annotations

from torch import nn

from grounding.adapter.structure import Stack
from grounding.core.errors import ModelError

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
