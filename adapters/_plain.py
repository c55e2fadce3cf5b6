"""Whether a module is what its family made it, so that a shortcut may compute its parts in its place."""

from __future__ import annotations

from torch import nn

OWN = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.GELU, nn.ModuleList)


def is_plain(module: nn.Module) -> bool:
    """No foreign parts (fine-tuning, quantisation), no hooks but those of transformers, which only look."""
    for part in module.modules():
        if type(part) not in OWN and not type(part).__module__.startswith("transformers."):
            return False
        hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if not all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            return False
    return True
