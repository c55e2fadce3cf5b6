"""State of a model and of the process that explanations must leave unchanged: snapshots and their comparison."""

import numpy as np
import torch
from PIL import Image, ImageFile


def snapshot(model):
    """Everything the state contract names, as comparable values."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return {
        "values": {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (
                list(m._forward_hooks),
                list(m._forward_pre_hooks),
                list(m._backward_hooks),
                list(m._backward_pre_hooks),
            )
            for n, m in model.named_modules()
        },
        "attention": [getattr(c, "_attn_implementation", None) for c in configs.values()],
        # Not the state of `random`: the run-time type checks of these tests draw from it.
        "random": (torch.get_rng_state(), np.random.get_state()[1].tolist()),
        "pil": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def unchanged(before, after):
    changed = [name for name in before if not same(before[name], after[name])]
    print("changed:", changed)
    return not changed


def disturb(model):
    """A state nobody would choose, so that restoring to a default is caught: mixed modes, frozen parts, gradients."""
    model.train()
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.full_like(parameter, 0.5) if i % 4 == 0 else None
