"""Adapters around small modules, and their slow reference pass: hooks on the bare module and a full backward pass."""

import torch

from adapters.module.adapter import ModuleAdapter, scores_of
from tests.support import models


def made(net, layer=None, width=64, height=64, **options):
    torch.manual_seed(0)
    model = models.shaken(net).double().eval()
    return ModuleAdapter(model, layer, **{"preprocess": models.to_pixels(width, height)} | options)


def tutorial(model, pixels, index, path):
    """Features and gradient (D, rows, columns) or (N, D) of one image by hooks on the bare model."""
    kept = {}

    def keep(module, args, out):
        kept["f"] = out
        out.retain_grad()
        return out.clone()  # or the next module may overwrite it

    handle = model.get_submodule(path).register_forward_hook(keep)
    scores_of(model(pixels[None]))[0, index].backward()
    handle.remove()
    return kept["f"][0].detach(), kept["f"].grad[0]
