"""Measure whether the cells of a layer follow the positions of the image, by changing one quarter of it at a time.

Shapes do not decide it: attention weights (B, heads, N, N) have the shape of feature maps, channels that of tokens, and
tokens may be ordered by windows instead of by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from grounding.adapter.patch_tokens import Layout
from grounding.adapter.recorder import Recorder

# The quarters of an image, (lower half, right half).
QUARTERS = ((0, 0), (0, 1), (1, 0), (1, 1))
# Minimum shift of the response from one half of the cells to the other (natural logarithm of the ratio of the two
# halves). Measured along at least one side: 0 +- 0.2 for attention weights and tokens in another order, 0.5 to 4 for
# tokens in order. The higher bound is for feature maps that might be attention weights, with as many cells on a side as
# there are tokens: those are early in a network, where the response is strong.
LEAST_RATIO, LEAST_RATIO_OF_SQUARES = 0.3, 0.6
# Number of cells below which any response counts.
FEW = 16


def spatial_response(
    model: nn.Module, run: Callable[[Tensor], object], like: Tensor, known: Mapping[str, Layout | None]
) -> dict[str, Tensor]:
    """How much each layer changes with the middle of each quarter of the image: path -> (4, rows, columns) of feature
    maps, (4, N) of tokens (those without a layout).

    `like` are pixel values (1, C, H, W) of the size to use. Attention weights are left out.
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
    """Whether (1, N, N) or (1, heads, N, N) are attention weights: not negative, rows that sum to 1."""
    square = output.shape[-1] == output.shape[-2]
    return bool(square and (output >= 0).all() and (output.float().sum(-1) - 1).abs().max() < 1e-2)


def is_spatial(change: Tensor, least: float = LEAST_RATIO) -> bool:
    """Whether the cells follow the positions of the image: a change further right (down) in the image changes cells
    further right (down), relative to the other changes. `change` is (4, rows, columns).

    Of fewer than `FEW` cells each depends on most of the image: any response counts.
    """
    rows, columns = change.shape[1:]
    if rows * columns < FEW:
        return bool(change.any())
    # (lower half of the image, right half, lower half of the cells, right half), as logarithms: ratios cancel how much
    # a cell changes in general.
    means = [[own[_half(rows, a), _half(columns, b)].mean() for a, b in QUARTERS] for own in change]
    response = (torch.tensor(means).double() + torch.finfo(torch.float32).tiny).log().reshape(2, 2, 2, 2)
    down = (response[:, :, 1] - response[:, :, 0]).mean(-1)  # how much more the lower cells change, by quarter
    right = (response[..., 1] - response[..., 0]).mean(-1)
    return bool(
        (rows == 1 or (down[1] - down[0]).mean() > least)
        and (columns == 1 or (right[:, 1] - right[:, 0]).mean() > least)
    )


def _middle(length: int, second: int) -> slice:
    """The middle part of a half of a side."""
    return slice(round(length * (second / 2 + 1 / 8)), max(round(length * (second / 2 + 3 / 8)), 1))


def _half(length: int, second: int) -> slice:
    """A half of a side. The middle one of an odd number of cells belongs to neither half, a single cell to both."""
    half = max(length // 2, 1)
    return slice(length - half, length) if second else slice(0, half)
