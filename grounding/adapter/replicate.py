"""Repeat inputs: one image per target, or several copies of one image."""

from __future__ import annotations

from dataclasses import replace

import torch

from grounding.adapter.inputs import Inputs, Targets


def one_image_per_target(inputs: Inputs, targets: Targets) -> tuple[Inputs, Targets]:
    """Return inputs whose k-th image and text are those of target k, and the targets with these indices."""
    image, text = targets.image.tolist(), targets.text.tolist()
    repeated = Inputs(
        images=inputs.images.select(image),
        texts=tuple(inputs.texts[t] for t in text),
        text_image=tuple(range(len(targets))),
        tensors={name: tensor[text] for name, tensor in inputs.tensors.items()},
    )
    own = torch.arange(len(targets))
    sequence = None if targets.sequence is None else own
    return repeated, replace(targets, image=own, text=own, sequence=sequence, baseline_sequence=None)


def repeat_image(inputs: Inputs, targets: Targets, count: int) -> tuple[Inputs, Targets]:
    """Return inputs with `count` copies of their one image, each with all texts, and K x count targets.

    The targets are ordered by the original target, then by copy.
    """
    texts = range(len(inputs.texts))
    repeated = Inputs(
        images=inputs.images.select([0] * count),
        texts=tuple(inputs.texts[t] for t in texts for _ in range(count)),
        text_image=tuple(s for _ in texts for s in range(count)),
        tensors={name: tensor.repeat_interleave(count, 0) for name, tensor in inputs.tensors.items()},
    )
    every = targets.select([k for k in range(len(targets)) for _ in range(count)])
    copy = torch.arange(count).repeat(len(targets))
    sequence = None if every.sequence is None else every.sequence * count + copy
    return repeated, replace(
        every, image=copy, text=every.text * count + copy, sequence=sequence, baseline_sequence=None
    )
