"""Whether a module is what its family made it, so that a shortcut may compute its parts in its place."""

from __future__ import annotations

from torch import nn

OWN = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.GELU, nn.Tanh, nn.Dropout, nn.ModuleList)
LIBRARY = ("transformers.models.", "transformers.activations")


def is_plain(module: nn.Module) -> bool:
    """No foreign parts (fine-tuning, quantisation), no `forward` in place of a part's own (as offloading puts), and no
    hooks but those of transformers, which only look."""
    for part in module.modules():
        if "forward" in vars(part) or not (type(part) in OWN or type(part).__module__.startswith(LIBRARY)):
            return False
        hooks = (
            *part._forward_hooks.values(),
            *part._forward_pre_hooks.values(),
            *part._backward_hooks.values(),
            *part._backward_pre_hooks.values(),
        )
        if not all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            return False
    return True
