"""Slow float64 oracles for methods that read inside the vision tower of a CLIP or SigLIP: LeGrad and Grad-ECLIP.

Every block is written out with its own q, k, v; the model gives the weights alone. Nothing here uses the project's
engine or the model's forward. Positions: CLIP's are the CLS token and then the patches, SigLIP's the patches.
"""

import math
from types import SimpleNamespace

import numpy as np
import torch


class Tower:
    """The vision tower of a CLIPModel or SiglipModel in float64 and one image, as explicit matrices.

    `detach`: the LN-rule, the deviation of every norm a constant in the backward pass.
    """

    def __init__(self, model, pixels, detach=False):
        self.vision, self.detach = model.vision_model, detach
        self.project = getattr(model, "visual_projection", None)
        self.pooled_by_attention = hasattr(self.vision, "head")
        self.heads = self.vision.config.num_attention_heads
        self.blocks = self.vision.encoder.layers
        self.pixels = pixels[0]

    @property
    def prefix(self):
        return 0 if self.pooled_by_attention else 1

    def norm(self, module, z):
        mean = z.mean(-1, keepdim=True)
        deviation = (((z - mean) ** 2).mean(-1, keepdim=True) + module.eps).sqrt()
        return (z - mean) / (deviation.detach() if self.detach else deviation) * module.weight + module.bias

    def embedded(self):
        """What enters the first block: (N, D)."""
        parts, size = self.vision.embeddings, self.vision.config.patch_size
        kernel = parts.patch_embedding.weight.flatten(1)
        _, height, width = self.pixels.shape
        rows = [self.vision_class()] if self.prefix else []
        for top in range(0, height, size):
            for left in range(0, width, size):
                token = kernel @ self.pixels[:, top : top + size, left : left + size].flatten()
                rows.append(token if parts.patch_embedding.bias is None else token + parts.patch_embedding.bias)
        z = torch.stack(rows) + parts.position_embedding.weight
        return self.norm(self.vision.pre_layrnorm, z) if self.prefix else z

    def vision_class(self):
        return self.vision.embeddings.class_embedding

    def heads_of(self, x):
        """(N, D) as (H, N, d)."""
        return x.reshape(len(x), self.heads, -1).transpose(0, 1)

    def attend(self, query, key, value, single=False):
        """Softmax attention of (Q, D) over (N, D): weights (H, Q, N) and the joined output (Q, D) of all heads.

        `single`: one head of full width, as the published Grad-ECLIP has it. The weights are then (1, Q, N).
        """
        split = (lambda x: x[None]) if single else self.heads_of
        q, k, v = split(query), split(key), split(value)
        weights = torch.stack([torch.softmax(a @ b.T / math.sqrt(a.shape[-1]), -1) for a, b in zip(q, k, strict=True)])
        return weights, torch.cat([a @ b for a, b in zip(weights, v, strict=True)], -1)

    def block(self, number, z, single=False):
        """One block on z (N, D): its `output`, and `weights`, `joined`, `query`, `key`, `value` of its attention."""
        layer = self.blocks[number]
        x, own = self.norm(layer.layer_norm1, z), layer.self_attn
        query, key, value = own.q_proj(x), own.k_proj(x), own.v_proj(x)
        weights, joined = self.attend(query, key, value, single)
        z = z + own.out_proj(joined)
        output = z + self.feed_forward(layer.mlp, self.norm(layer.layer_norm2, z))
        return SimpleNamespace(
            output=output, weights=weights, joined=joined, query=query, key=key, value=value, projection=own.out_proj
        )

    def feed_forward(self, mlp, x):
        return mlp.fc2(mlp.activation_fn(mlp.fc1(x)))

    def pool(self, z, single=False):
        """SigLIP's attention pooling of z (N, D): as `block`, the output (D,) and one query."""
        head = self.vision.head
        width = z.shape[-1]
        parts = zip(head.attention.in_proj_weight.split(width), head.attention.in_proj_bias.split(width), strict=True)
        inputs = (head.probe[0], z, z)
        query, key, value = (x @ weight.T + bias for (weight, bias), x in zip(parts, inputs, strict=True))
        weights, joined = self.attend(query, key, value, single)
        x = head.attention.out_proj(joined)
        output = (x + self.feed_forward(head.mlp, self.norm(head.layernorm, x)))[0]
        projection = head.attention.out_proj
        return SimpleNamespace(
            output=output, weights=weights, joined=joined, query=query, key=key, value=value, projection=projection
        )

    def score(self, pooled, text):
        """Cosine of the image embedding of a pooled vector (D,), behind the last norm, and a text (E,) of length 1."""
        image = pooled if self.project is None else self.project(pooled)
        return image @ text / image.norm()

    def inputs(self):
        """What enters each block, and the output of the last: L + 1 tensors (N, D), off the graph."""
        with torch.no_grad():
            states = [self.embedded()]
            for number in range(len(self.blocks)):
                states.append(self.block(number, states[-1]).output)
        return states

    def final(self, z, text):
        """The model's own score of the output (N, D) of its last block, and its pooling (CLIP: None)."""
        if self.pooled_by_attention:
            pool = self.pool(self.norm(self.vision.post_layernorm, z))
            return self.score(pool.output, text), pool
        return self.score(self.norm(self.vision.post_layernorm, z[0]), text), None


def legrad(tower, text, start=0, pooling="mean"):
    """LeGrad (Bousselham et al. 2024) of a CLIP, per patch: (P,).

    Of every block from `start`: the score s of that block's own output, pooled by the mean over all its tokens or by
    the CLS token; G = ds / dA, A the attention of the same block; the mean over heads and queries of (G)+. Then the
    mean over blocks.
    """
    states, maps = tower.inputs(), []
    for number in range(start, len(tower.blocks)):
        found = tower.block(number, states[number].requires_grad_())
        pooled = found.output.mean(0) if pooling == "mean" else found.output[0]
        score = tower.score(tower.norm(tower.vision.post_layernorm, pooled), text)
        [gradient] = torch.autograd.grad(score, found.weights)
        maps.append(positive_mean(gradient.numpy())[tower.prefix :])
    return sum(maps) / len(maps)


def legrad_pool(tower, text, start=0, final_norm=True):
    """LeGrad of a SigLIP, per patch: (P,).

    Of every block from `start`: its output through the last norm and the attention pooling; G = ds / dA, A the
    attention of the pooling; the mean over heads of (G)+ in its one row. Then the mean over blocks. `final_norm` False:
    as published, where the pooling reads the block's output itself.
    """
    maps = []
    for z in tower.inputs()[start + 1 :]:
        z = z.requires_grad_()
        pool = tower.pool(tower.norm(tower.vision.post_layernorm, z) if final_norm else z)
        [gradient] = torch.autograd.grad(tower.score(pool.output, text), pool.weights)
        maps.append(positive_mean(gradient.numpy()))
    return sum(maps) / len(maps)


def positive_mean(gradient):
    """(H, Q, N) -> (N,): the mean over heads and queries of the positive part."""
    heads, queries, keys = gradient.shape
    return np.array(
        [
            sum(max(gradient[h, q, n], 0.0) for h in range(heads) for q in range(queries)) / (heads * queries)
            for n in range(keys)
        ]
    )


def grad_eclip(gradient, value, query, key, heads=1):
    """Grad-ECLIP (Zhao et al. 2024), eq. 7-8, before its ReLU: (P,).

    gradient, query (D,): of the attention's output and of q at the pooling position; value, key (P, D). `heads` 1: one
    cosine per patch over the whole width; more: each head's channels with that head's own cosine.
    """
    patches, width = value.shape
    per = width // heads
    result = np.zeros(patches)
    for first in range(0, width, per):
        channels = range(first, first + per)
        q, ks = query[first : first + per], key[:, first : first + per]
        cosines = [q @ k / np.sqrt((q @ q) * (k @ k)) for k in ks]
        for p, weight in enumerate(minmax(cosines)):
            result[p] += sum(gradient[c] * value[p, c] * weight for c in channels)
    return result


def minmax(values):
    """To 0..1; where all are alike, 1: no patch weighs less than another."""
    low, high = min(values), max(values)
    return [1.0 if high == low else (v - low) / (high - low) for v in values]


def grad_eclip_of(tower, text, form="model"):
    """Grad-ECLIP of the attention that the pooling reads: CLIP's last block, SigLIP's pooling. (P,), before the ReLU.

    form: `model`, the model's own score, one cosine over the width of all heads; `heads`, one per head; `plain`, no
    cosine; `published`, the released code: this attention with a single head of full width, which changes the score,
    and the cosine of q and k behind the output projection with its bias.
    """
    states, single = tower.inputs(), form == "published"
    z = states[-1 if tower.pooled_by_attention else -2].requires_grad_()
    if tower.pooled_by_attention:
        found = tower.pool(tower.norm(tower.vision.post_layernorm, z), single)
        score = tower.score(found.output, text)
    else:
        found = tower.block(len(tower.blocks) - 1, z, single)
        score = tower.score(tower.norm(tower.vision.post_layernorm, found.output[0]), text)
    gradient = torch.autograd.grad(score, found.joined)[0][0].numpy()
    with torch.no_grad():
        query, key = (found.projection(x) if single else x for x in (found.query, found.key))
    patches = slice(tower.prefix, None)
    value, query, key = (t.detach().numpy() for t in (found.value[patches], query[0], key[patches]))
    if form == "plain":
        return value @ gradient
    return grad_eclip(gradient, value, query, key, tower.heads if form == "heads" else 1)
