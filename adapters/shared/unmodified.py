"""Check that a module is unmodified (no hooks, wrappers, quantised layers), so that a fast path may recompute it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

OWN = (
    nn.Linear,
    nn.LayerNorm,
    nn.Embedding,
    nn.GELU,
    nn.Tanh,
    nn.Dropout,
    nn.ModuleList,
    nn.MultiheadAttention,
    NonDynamicallyQuantizableLinear,  # its output projection
)
LIBRARY = ("transformers.models.", "transformers.activations")


def is_unmodified(module: nn.Module) -> bool:
    """Whether all submodules are of known classes (none of fine-tuning or quantisation), without hooks or wrappers."""
    return all(
        (type(part) in OWN or type(part).__module__.startswith(LIBRARY)) and has_no_hooks(part)
        for part in module.modules()
    )


def parents_unmodified(model: nn.Module, *paths: str) -> bool:
    """Whether all parents of the modules at these paths `has_no_hooks`: a fast path does not run them."""
    outer = {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)}
    return has_no_hooks(model) and all(has_no_hooks(model.get_submodule(path)) for path in outer)


def has_no_hooks(part: nn.Module) -> bool:
    """Whether a module has its class's `forward` (offloading replaces it) and no hooks but those of transformers, which
    only record."""
    hooks = (
        *part._forward_hooks.values(),
        *part._forward_pre_hooks.values(),
        *part._backward_hooks.values(),
        *part._backward_pre_hooks.values(),
    )
    own = all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
    return own and "forward" not in vars(part)
