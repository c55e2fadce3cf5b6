"""Whether the cells of a layer lie as the picture does: measured, as shapes alone do not tell. Attention weights (B,
heads, N, N) have the shape of maps, channels that of tokens, and tokens may go by windows and not by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from grounding.adapter.patch_layout import Layout
from grounding.adapter.recorder import Recorder

# The quarters of a picture, (lower half, right half).
QUARTERS = ((0, 0), (0, 1), (1, 0), (1, 1))
# How far half a picture must move what changes (natural logarithm of the ratio of two halves of the cells): attention
# weights and tokens in another order have 0 +- 0.2 along one side at least, tokens 0.5 to 4. Maps with as many cells on
# a side as there are tokens stand early in a network, where the change is nearly all there is.
CLEARLY, BEYOND_DOUBT = 0.3, 0.6
# Cells.
FEW = 16


def spatial_response(
    model: nn.Module, run: Callable[[Tensor], object], like: Tensor, known: Mapping[str, Layout | None]
) -> dict[str, Tensor]:
    """How much each layer changes when the middle of one quarter of the picture does: path -> (4, rows, columns) of
    maps, (4, N) of tokens (no layout). `like` is a picture as the model takes it. Weights between tokens are left out.
    """
    height, width = like.shape[-2:]
    steps = torch.arange(like.numel(), device=like.device).reshape(like.shape)
    image = steps.sin().to(like.dtype)

    def outputs(pixels: Tensor) -> dict[str, Tensor]:
        with Recorder(model, dict.fromkeys(known, False)) as recorder:
            run(pixels.clone())
        return recorder.outputs

    before = outputs(image)
    known = {path: known[path] for path, output in before.items() if not _are_weights(output)}
    found = {path: list[Tensor]() for path in known}
    for lower, right in QUARTERS:
        rows, columns = _middle(height, lower), _middle(width, right)
        changed = image.clone()
        changed[..., rows, columns] -= 2 * (steps[..., rows, columns] * 1.7).cos().to(like.dtype)
        after = outputs(changed)
        for path, layout in known.items():
            change = (after[path].float() - before[path].float()).abs()
            found[path].append((layout.fold(change) if layout else change)[0].sum(-1))
    return {path: torch.stack(own).cpu() for path, own in found.items()}


def _are_weights(output: Tensor) -> bool:
    """Whether (1, N, N) or (1, heads, N, N) are the weights by which N tokens are mixed."""
    square = output.shape[-1] == output.shape[-2]
    return bool(square and (output >= 0).all() and (output.float().sum(-1) - 1).abs().max() < 1e-2)


def is_spatial(change: Tensor, least: float = CLEARLY) -> bool:
    """Whether the cells lie as the picture does: what changes to the right (further down) in the picture changes
    cells further to the right (further down), compared with what else moves them. `change` is (4, rows, columns).

    Of few cells each sees most of the picture: they need only change at all.
    """
    rows, columns = change.shape[1:]
    if rows * columns < FEW:
        return bool(change.any())
    # (lower half of the picture, right half, lower half of the cells, right half); cells that always move count less.
    means = [[own[_half(rows, a), _half(columns, b)].mean() for a, b in QUARTERS] for own in change]
    moved = (torch.tensor(means).double() + torch.finfo(torch.float32).tiny).log().reshape(2, 2, 2, 2)
    down = (moved[:, :, 1] - moved[:, :, 0]).mean(-1)  # how much more the lower cells change, by quarter
    right = (moved[..., 1] - moved[..., 0]).mean(-1)
    return bool(
        (rows == 1 or (down[1] - down[0]).mean() > least)
        and (columns == 1 or (right[:, 1] - right[:, 0]).mean() > least)
    )


def _middle(length: int, second: int) -> slice:
    """The middle part of a half of a side."""
    return slice(round(length * (second / 2 + 1 / 8)), max(round(length * (second / 2 + 3 / 8)), 1))


def _half(length: int, second: int) -> slice:
    """A half of a side; of an odd number of cells the one in the middle belongs to neither, a single one to both."""
    half = max(length // 2, 1)
    return slice(length - half, length) if second else slice(0, half)
