"""Whether a module is what its family made it, so that a shortcut may compute its parts in its place."""

from __future__ import annotations

from torch import nn

OWN = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.GELU, nn.Tanh, nn.Dropout, nn.ModuleList)
LIBRARY = ("transformers.models.", "transformers.activations")


def is_unmodified(module: nn.Module) -> bool:
    """No foreign parts (fine-tuning, quantisation), no `forward` in place of a part's own (as offloading puts), and no
    hooks but those of transformers, which only look."""
    return all(
        (type(part) in OWN or type(part).__module__.startswith(LIBRARY)) and has_no_hooks(part)
        for part in module.modules()
    )


def parents_unmodified(model: nn.Module, *paths: str) -> bool:
    """Whether nothing is attached to any module that the modules at these paths lie in: a shortcut skips those."""
    outer = {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)}
    return has_no_hooks(model) and all(has_no_hooks(model.get_submodule(path)) for path in outer)


def has_no_hooks(part: nn.Module) -> bool:
    """Whether no `forward` was put in place of the part's own, and it has no hooks but those of transformers."""
    hooks = (
        *part._forward_hooks.values(),
        *part._forward_pre_hooks.values(),
        *part._backward_hooks.values(),
        *part._backward_pre_hooks.values(),
    )
    own = all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
    return own and "forward" not in vars(part)
