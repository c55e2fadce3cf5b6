"""Targets of a matching head that reads image and text together: one text sequence per image and text.

Targets of the same image and text share a sequence (`Targets.sequence`). To match a part of a caption, the score of the
caption with that part masked is subtracted: one more sequence, after all others (`Targets.baseline_sequence`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adapters.shared.text_targets import scored_as, span_ids
from adapters.shared.tokenization import pad
from grounding.adapter.inputs import Inputs, Targets


def sequence_targets(
    inputs: Inputs, targets: Targets, pad_id: int, dtype: torch.dtype, *, before: int = 0, per_token: bool = False
) -> Targets:
    """Add to each target its text (`ids`, `mask`), the mask of the text it is compared with (`compared`), its sequence,
    and the positions where attention chains start: those of the span.

    A matching head reads the first token alone, but that token attends to the words, and the words to the image: chains
    from the row of the first token show little (measured on the demo FLAVA). `before` tokens precede the text in the
    sequence. With `per_token` each position has a score of its own and no part of a text is left out. The rows where
    chains start are in `dtype`, or float32 if that has fewer digits.
    """
    flat = targets.flat
    modes = ["whole" if per_token else scored_as(span, targets.token_target) for _, span in flat]
    own = [
        span_ids(inputs.texts[t], span) if mode == "alone" else list(inputs.texts[t].ids)
        for (t, span), mode in zip(flat, modes, strict=True)
    ]
    device = inputs.tensors["input_ids"].device
    ids, mask = pad(own, pad_id, device)
    compared = mask.clone()
    start = torch.zeros(len(flat), before + ids.shape[1], device=device)
    for k, (t, span) in enumerate(flat):
        positions = torch.tensor(span.positions or inputs.texts[t].visible, device=device)
        if modes[k] == "left out":
            compared[k, positions] = 0
        if modes[k] == "alone":  # a text of its own: its tokens follow the first special ones
            positions = inputs.texts[t].visible[0] + torch.arange(len(positions), device=device)
        start[k, before + positions] = 1 / len(positions)
    start = start.to(dtype if dtype.itemsize >= 4 else torch.float32)
    known: dict[tuple[int, ...], int] = {}
    sequence = [known.setdefault((b, *text), len(known)) for b, text in zip(targets.image.tolist(), own, strict=True)]
    left_out = [mode == "left out" for mode in modes]
    # Sequences with a masked part follow those of the texts, in the order of their targets.
    other = [len(known) + sum(left_out[:k]) if out else -1 for k, out in enumerate(left_out)]
    return replace(
        targets,
        data={"ids": ids, "mask": mask, "compared": compared},
        sequence=torch.tensor(sequence),
        chain_start=start,
        read_rows=start if per_token else None,
        baseline_sequence=torch.tensor(other) if any(left_out) else None,
    )


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """The R sequences that targets of `sequence_targets` read, those with a masked part last.

    Parameters
    ----------
    rows: index of a target with the image and the text of each sequence.
    mask: attention mask of the text of each sequence.
    own: index of the sequence of each target.
    left_out: the targets that are differences; their other sequences are the last ones, in this order.
    """

    rows: Int[Tensor, "R"]
    mask: Int[Tensor, "R L"]
    own: Int[Tensor, "K"]
    left_out: Int[Tensor, "m"]

    @classmethod
    def of(cls, targets: Targets, device: torch.device) -> SequenceBatch:
        """Return the sequences of these targets."""
        index = torch.unique(targets.sequences, return_inverse=True)[1]
        units, data = index.tolist(), targets.data
        first = [units.index(unit) for unit in range(max(units) + 1)]
        left_out = (data["compared"] != data["mask"]).any(1).nonzero().flatten()
        rows = torch.cat([torch.tensor(first, device=device), left_out])
        mask = torch.cat([data["mask"][first], data["compared"][left_out]])
        return cls(rows, mask, index.to(device), left_out)

    def differences(self, scores: Float[Tensor, "R"]) -> Float[Tensor, "K"]:
        """Return the score of each target's own sequence, minus that of the one it is compared with."""
        return scores[self.own].index_add(0, self.left_out, -scores[len(self.rows) - len(self.left_out) :])
