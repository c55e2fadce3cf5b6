"""Slow float64 oracles for methods that score altered images: occlusion and RISE. One score per image, plain loops."""

import numpy as np


def starts(length, window, stride):
    """First cells of the windows along an axis: 0, stride, ... until one reaches the end; the last may be cut off."""
    found = [0]
    while found[-1] + window < length:
        found.append(found[-1] + stride)
    return found


def occlusion(score, pixels, baseline, patch, window=1, stride=1):
    """Zeiler & Fergus 2014: f(x) - f(x with one window at its baseline), averaged per patch over the windows on it.

    score: (C, H, W) -> number; pixels, baseline (C, H, W); patch: its side in pixels; window and stride in patches.
    Returns (rows, columns).
    """
    rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
    total, count = np.zeros((rows, columns)), np.zeros((rows, columns))
    whole = score(pixels)
    for top in starts(rows, window, stride):
        for left in starts(columns, window, stride):
            covered = [(r, c) for r in range(top, top + window) for c in range(left, left + window)]
            covered = [(r, c) for r, c in covered if r < rows and c < columns]
            altered = pixels.copy()
            for r, c in covered:
                cell = (slice(None), slice(r * patch, (r + 1) * patch), slice(c * patch, (c + 1) * patch))
                altered[cell] = baseline[cell]
            lost = whole - score(altered)
            for r, c in covered:
                total[r, c] += lost
                count[r, c] += 1
    return total / count


def rise_mask(cells, shift, height, width):
    """Petsiuk et al. 2018, section 3.2: cells (h, w) of 0 and 1, enlarged bilinearly to (h + 1, w + 1) cells of
    ceil(H / h) x ceil(W / w) pixels, and cut out from `shift` (down, right) on: (H, W).

    Centres of pixels against centres of cells; beyond the outer centres the outer cell's value.
    """
    h, w = cells.shape
    tall, wide = (h + 1) * -(-height // h), (w + 1) * -(-width // w)
    mask = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            down = min(max((y + shift[0] + 0.5) * h / tall - 0.5, 0), h - 1)
            right = min(max((x + shift[1] + 0.5) * w / wide - 0.5, 0), w - 1)
            top, left = int(down), int(right)
            for r, c, share in (
                (top, left, (1 - down + top) * (1 - right + left)),
                (top, left + 1, (1 - down + top) * (right - left)),
                (top + 1, left, (down - top) * (1 - right + left)),
                (top + 1, left + 1, (down - top) * (right - left)),
            ):
                if share:
                    mask[y, x] += share * cells[r, c]
    return mask


def rise(score, pixels, baseline, masks, keep, patch, centred=False):
    """Petsiuk et al. 2018, eq. 6: sum_i f(x M_i + b (1 - M_i)) M_i / (N p), the mean over each patch's pixels.

    score: (C, H, W) -> number; masks (N, H, W); keep: the probability p. `centred`: f less its mean over the masks.
    Returns (rows, columns).
    """
    scores = [score(pixels * mask + baseline * (1 - mask)) for mask in masks]
    middle = sum(scores) / len(scores) if centred else 0.0
    found = np.zeros(pixels.shape[1:])
    for one, mask in zip(scores, masks, strict=True):
        found += (one - middle) * mask
    found /= len(masks) * keep
    rows, columns = found.shape[0] // patch, found.shape[1] // patch
    return np.array(
        [
            [found[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].mean() for c in range(columns)]
            for r in range(rows)
        ]
    )
