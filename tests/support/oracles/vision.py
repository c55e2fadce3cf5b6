"""Slow float64 oracles, written from the papers' definitions with loops, and a tutorial-style recorder for CLIP.

Nothing here uses the project's engine: own forward, own hooks, one full backward per target.
"""

import copy

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

KEPT = []


def textbook_attention(module, query, key, value, attention_mask, scaling, **_):
    """softmax(Q K^T / sqrt(d)) V in the model's own precision; transformers' eager form rounds to float32."""
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    weights = (logits if attention_mask is None else logits + attention_mask).softmax(-1)
    KEPT.append(weights)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value), weights


AttentionInterface.register("textbook", textbook_attention)
AttentionMaskInterface.register("textbook", eager_mask)


class Tutorial:
    """What a well-made tutorial does for one image: a full forward and backward per target, hooks on a live model."""

    def __init__(self, model, pixels):
        # A copy: no weights are recorded from a model whose attention is not of transformers.
        self.model, self.pixels = copy.deepcopy(model), pixels
        self.model.set_attn_implementation("textbook")

    def run(self, seed, layer):
        """(features, gradient) (N, D) at `layer`, [(attention, gradient)] (H, N, N) per block, for one target."""
        kept = {}
        handle = self.model.get_submodule(layer).register_forward_hook(lambda m, a, out: kept.update(f=out))
        self.model.zero_grad()
        KEPT.clear()
        out = self.model.vision_model(self.pixels)
        handle.remove()
        kept["f"].retain_grad()
        for attention in KEPT:
            attention.retain_grad()
        image = self.model.visual_projection(out.pooler_output)
        score = (image / image.norm(dim=-1, keepdim=True))[0] @ seed
        score.backward()
        gradient = torch.zeros_like(kept["f"]) if kept["f"].grad is None else kept["f"].grad
        pairs = [(a[0].detach().numpy(), a.grad[0].numpy()) for a in KEPT]
        return score.item(), kept["f"][0].detach().numpy(), gradient[0].numpy(), pairs


def constant_deviation_norm(self, x):
    """A LayerNorm's forward written out, its standard deviation no part of the graph."""
    mean = x.mean(-1, keepdim=True)
    deviation = torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + self.eps).detach()
    return (x - mean) / deviation * self.weight + self.bias


def text_embedding(model, tokenizer, text, hidden=()):
    """Normalised CLIP embedding of a text, with the tokens at positions `hidden` masked."""
    encoded = tokenizer(text, return_tensors="pt")
    mask = encoded["attention_mask"].clone()
    mask[0, list(hidden)] = 0
    with torch.no_grad():
        out = model.get_text_features(encoded["input_ids"], attention_mask=mask).pooler_output[0]
    return out / out.norm()


def gradcam(features, gradient):
    """Selvaraju et al. 2017, eq. 1-2, before the ReLU: features, gradient (P, D) -> (P,)."""
    patches, width = features.shape
    weights = [sum(gradient[p, d] for p in range(patches)) / patches for d in range(width)]
    return np.array([sum(weights[d] * features[p, d] for d in range(width)) for p in range(patches)])


def hirescam(features, gradient):
    """Draelos & Carin 2020: every feature times its own gradient, summed over channels: (P, D) twice -> (P,)."""
    return np.array([sum(g * f for g, f in zip(*pair, strict=True)) for pair in zip(gradient, features, strict=True)])


def layercam(features, gradient):
    """Jiang et al. 2021, eq. 4-6, before the ReLU: as `hirescam` with the positive gradients alone."""
    return hirescam(features, np.maximum(gradient, 0))


def gradcam_pp(features, gradient, eps=0.0):
    """Chattopadhay et al. 2018, eq. 19, with alpha = 0 where the gradient is 0, before the ReLU: (P, D) twice -> (P,).

    `eps` stands in the denominator of the published implementation (1e-6 there).
    """
    patches, width = features.shape
    weights = []
    for d in range(width):
        total = sum(features[q, d] for q in range(patches))
        weight = 0.0
        for p in range(patches):
            g = gradient[p, d]
            alpha = g**2 / (2 * g**2 + total * g**3 + eps) if g else 0.0
            weight += alpha * max(g, 0.0)
        weights.append(weight)
    return np.array([sum(weights[d] * features[p, d] for d in range(width)) for p in range(patches)])


def gradcam_pp_by_derivatives(features, score):
    """Grad-CAM++ from its derivation (eq. 7 and 10), the derivatives of Y = exp(score) by autograd: (D, P) -> (P,).

    `score` is a function of the features. Divided by exp(score), the one factor that all weights share.
    """
    features = features.clone().requires_grad_()
    y = score(features).exp()
    first = torch.autograd.grad(y, features, create_graph=True)[0]
    weights = []
    for d in range(features.shape[0]):
        total = features[d].sum().detach()
        weight = 0.0
        for p in range(features.shape[1]):
            second = torch.autograd.grad(first[d, p], features, create_graph=True)[0][d, p]
            third = torch.autograd.grad(second, features, retain_graph=True)[0][d, p]
            below = 2 * second + total * third
            alpha = second / below if below else torch.zeros(())
            weight += (alpha * first[d, p].clamp(min=0) / y).item()
        weights.append(weight)
    return np.array(weights) @ features.detach().numpy()


CAMS = {"gradcam": gradcam, "hirescam": hirescam, "layercam": layercam, "gradcam_pp": gradcam_pp}


def rollout(attentions, fusion=np.mean, discard=0.0):
    """Abnar & Zuidema 2020: the product of row-normalised (A + I), last block leftmost: (N, N)."""
    joint = np.eye(attentions[0].shape[-1])
    for attention in attentions:
        fused = fusion(attention, axis=0)
        for row in fused:
            row[np.argsort(row, kind="stable")[: int(discard * len(row))]] = 0
        with_identity = fused + np.eye(len(fused))
        joint = np.array([row / row.sum() for row in with_identity]) @ joint
    return joint


def gradient_rollout(pairs):
    """Rollout of the head mean of the positive part of A * G."""
    return rollout([np.maximum(a * g, 0).mean(0, keepdims=True) for a, g in pairs])


def relevance(pairs, start=0):
    """Chefer et al. 2021, the self-attention rule: R = I; R = R + mean_h (G * A)+ R per block: (N, N)."""
    relevancy = np.eye(pairs[0][0].shape[-1])
    for attention, gradient in pairs[start:]:
        relevancy = relevancy + np.maximum(gradient * attention, 0).mean(0) @ relevancy
    return relevancy


def attention_gradcam(attention, gradient):
    """Attention Grad-CAM: the head mean of A * (G)+ : (N, N)."""
    return (attention * np.maximum(gradient, 0)).mean(0)
