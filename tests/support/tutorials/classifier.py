"""Slow reference pass for image classifiers: hooks on the bare model and a full backward pass for each image."""

import copy

from tests.support.contract import structure
from tests.support.oracles import vision

ASKED = [2, "crane, BIRD", "two dogs"]
INDICES = [2, 8, 1]


def tutorial(adapter, image, index, path):
    """Logits, features and gradient of one image by a full backward with hooks on the bare model, and attention."""
    # A copy: no weights are recorded from a model whose attention is not of transformers.
    model, kept = copy.deepcopy(adapter.model), {}
    if structure(adapter).stacks["vision"].attention:
        model.set_attn_implementation("textbook")
    vision.KEPT.clear()
    pixels = adapter.image_processor(image, return_tensors="pt")["pixel_values"].to(adapter.dtype)
    handle = model.get_submodule(path).register_forward_hook(
        lambda m, a, out: kept.update(f=out[0] if isinstance(out, tuple) else out)
    )
    logits = model(pixel_values=pixels).logits[0]
    handle.remove()
    kept["f"].retain_grad()
    for attention in vision.KEPT:
        attention.retain_grad()
    logits[index].backward()
    pairs = [(a[0].detach().numpy(), a.grad[0].numpy()) for a in vision.KEPT]
    return logits.detach(), kept["f"][0].detach(), kept["f"].grad[0], pairs


def as_patches(tensor, prefix):
    """(patches, D) of a map (D, rows, columns) or of tokens."""
    return (tensor.flatten(1).T if tensor.ndim == 3 else tensor[prefix:]).numpy()
