"""Repeat inputs: one image per target, or several copies of one image."""

from __future__ import annotations

from dataclasses import replace

import torch

from grounding.adapter.inputs import Inputs, Targets


def one_image_per_target(inputs: Inputs, targets: Targets) -> tuple[Inputs, Targets]:
    """Return inputs whose k-th image and text are those of target k, and the targets with these indices."""
    image, text = targets.image.tolist(), targets.text.tolist()
    per_text = set(inputs.per_text)
    tensors = {
        name: tensor[image] if name in inputs.per_image else tensor[text] if name in per_text else tensor
        for name, tensor in inputs.tensors.items()
    }
    own = torch.arange(len(targets))
    repeated = Inputs(
        images=tuple(inputs.images[b] for b in image),
        geometry=tuple(inputs.geometry[b] for b in image),
        tokens=tuple(inputs.tokens[t] for t in text),
        text_image=tuple(range(len(targets))),
        tensors=tensors,
        per_image=inputs.per_image,
        per_text=inputs.per_text,
    )
    unit = None if targets.unit is None else own
    return repeated, replace(targets, image=own, text=own, unit=unit, other=None)


def repeat_image(inputs: Inputs, targets: Targets, count: int) -> tuple[Inputs, Targets]:
    """Return inputs with `count` copies of their one image, each with all texts, and K x count targets.

    The targets are ordered by the original target, then by copy.
    """
    texts = range(len(inputs.tokens))
    tensors = {
        name: tensor[[0] * count] if name in inputs.per_image
        else tensor.repeat_interleave(count, 0) if name in inputs.per_text
        else tensor
        for name, tensor in inputs.tensors.items()
    }  # fmt: skip
    repeated = Inputs(
        images=inputs.images * count,
        geometry=inputs.geometry * count,
        tokens=tuple(inputs.tokens[t] for t in texts for _ in range(count)),
        text_image=tuple(s for _ in texts for s in range(count)),
        tensors=tensors,
        per_image=inputs.per_image,
        per_text=inputs.per_text,
    )
    every = targets.select([k for k in range(len(targets)) for _ in range(count)])
    copy = torch.arange(count).repeat(len(targets))
    unit = None if every.unit is None else every.unit * count + copy
    return repeated, replace(every, image=copy, text=every.text * count + copy, unit=unit, other=None)
