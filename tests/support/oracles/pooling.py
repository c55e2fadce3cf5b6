"""Slow float64 oracles of methods that read the image encoder of a SigLIP: from the score through the attention
pooling head to the patches, by explicit matrices and one backward pass per target. Nothing here uses the project's
engine or the model's forward."""

from types import SimpleNamespace

import numpy as np
import torch

from tests.support.oracles.towers import Tower


class PackedTower(Tower):
    """The tower of a Siglip2Model and one image: its real patches alone, no padding and no mask."""

    def __init__(self, model, tensors, image=0, detach=False):
        self.slots = tensors["pixel_values"][image]
        self.grid = tensors["spatial_shapes"][image].tolist()
        super().__init__(model, tensors["pixel_values"][image : image + 1], detach)

    @property
    def prefix(self):
        return 0

    def embedded(self):
        parts, (rows, columns) = self.vision.embeddings, self.grid
        side = parts.position_embedding_size
        table = parts.position_embedding.weight.reshape(side, side, -1).permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(
            table, size=(rows, columns), mode="bilinear", align_corners=False, antialias=True
        )
        positions = resized[0].flatten(1).T.to(self.slots.dtype)
        return parts.patch_embedding(self.slots[: rows * columns]) + positions


def run(tower, text):
    """One target: its `score`; (weights, gradient) of each block, (H, N, N), as `blocks`, of the pooling, (H, 1, N), as
    `pool`; (features, gradient) (N, D) of the last block's output and of the norm behind it, as `last`, `normed`."""
    z, kept = tower.embedded(), []
    for number in range(len(tower.blocks)):
        found = tower.block(number, z)
        kept.append(found.weights)
        z = found.output
    normed = tower.norm(tower.vision.post_layernorm, z)
    pool = tower.pool(normed)
    score = tower.score(pool.output, text)
    tensors = [*kept, pool.weights, z, normed]
    gradients = torch.autograd.grad(score, tensors)
    pairs = [(t.detach().numpy(), g.numpy()) for t, g in zip(tensors, gradients, strict=True)]
    return SimpleNamespace(score=score.item(), blocks=pairs[:-3], pool=pairs[-3], last=pairs[-2], normed=pairs[-1])


def rollout(found):
    """The row of E_h A_pool prod_l rownorm(E_h A_l + I), last block first, as products of whole matrices: (N,)."""
    size = found.blocks[0][0].shape[-1]
    product = np.eye(size)
    for weights, _ in found.blocks:
        mixed = weights.mean(0) + np.eye(size)
        product = (mixed / mixed.sum(-1, keepdims=True)) @ product
    return (found.pool[0].mean(0) @ product)[0]


def relevance(found):
    """E_h (G A)+ of the pooling times R, where R <- R + E_h (G A)+ R from R = I over the blocks: (N,)."""
    matrix = np.eye(found.blocks[0][0].shape[-1])
    for weights, gradient in found.blocks:
        matrix = matrix + positive(weights, gradient) @ matrix
    return (positive(*found.pool) @ matrix)[0]


def gradient_rollout(found):
    """E_h A_pool prod_l rownorm(E_h (G A_l)+ + I), last block first: (N,)."""
    size = found.blocks[0][0].shape[-1]
    product = np.eye(size)
    for weights, gradient in found.blocks:
        mixed = positive(weights, gradient) + np.eye(size)
        product = (mixed / mixed.sum(-1, keepdims=True)) @ product
    return (found.pool[0].mean(0) @ product)[0]


def positive(weights, gradient):
    """(H, Q, S) twice -> (Q, S): the mean over heads of the positive part of the product."""
    return np.maximum(weights * gradient, 0).mean(0)
