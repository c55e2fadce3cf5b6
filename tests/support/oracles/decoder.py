"""Slow float64 oracles for encoder-decoders: the corrected tutorial loop, a full forward and backward per token.

Nothing here uses the project's engine.
"""

import copy

import numpy as np
import torch

from tests.support.oracles import vision as oracles


class Tutorial:
    """One image and one sequence (start token first): everything a well-made tutorial records for one token."""

    def __init__(self, model, pixels, sequence):
        # A copy: no weights are recorded from a model whose attention is not of transformers.
        self.model, self.pixels, self.sequence = copy.deepcopy(model), pixels, torch.tensor([sequence])
        # Parts of such a model keep configurations of their own, which setting the model's would not reach.
        for part in self.model.modules():
            if hasattr(part, "config"):
                part.config._attn_implementation = "textbook"

    def run(self, row, token, layer):
        """Logit of `token` at `row`, features and gradient (N, D) at `layer`, and by stack the pairs of attention and
        gradient (H, Q, S) of each block."""
        kept = {}
        handle = self.model.get_submodule(layer).register_forward_hook(lambda m, a, out: kept.update(f=out))
        self.model.zero_grad()
        oracles.KEPT.clear()
        out = self.model(self.pixels, decoder_input_ids=self.sequence[:, :-1], output_attentions=True, use_cache=False)
        handle.remove()
        count = self.model.config.encoder.num_hidden_layers
        vision, rest = oracles.KEPT[:count], oracles.KEPT[count:]
        # TrOCR's decoder gives its attention back; the others' went through the textbook, among and across in turn.
        own = (rest[::2], rest[1::2]) if rest else (list(out.decoder_attentions), list(out.cross_attentions))
        stacks = {"vision": vision, "decoder": own[0], "cross": own[1]}
        for tensor in [kept["f"], *(a for own in stacks.values() for a in own)]:
            tensor.retain_grad()
        logit = out.logits[0, row, token]
        logit.backward()
        pairs = {
            name: [(a[0].detach().numpy(), np.zeros(a[0].shape) if a.grad is None else a.grad[0].numpy()) for a in own]
            for name, own in stacks.items()
        }
        return logit.item(), kept["f"][0].detach().numpy(), kept["f"].grad[0].numpy(), pairs


def normalised(relevancy):
    """N(R) = rownorm(R - I) + I, an empty row of R - I staying empty: Chefer et al. 2021, eq. 8-9."""
    rest = relevancy - np.eye(len(relevancy))
    return np.array([row / row.sum() if row.sum() else row for row in rest]) + np.eye(len(relevancy))


def bimodal_relevance(pairs, encoder):
    """Chefer et al. 2021, eq. 5-6 and 10, for an encoder-decoder with `encoder` (N, N) for N(R_qq): R_sq (L, N)."""

    def led(pair):
        return np.maximum(pair[0] * pair[1], 0).mean(0)

    text = np.eye(pairs["decoder"][0][0].shape[-1])
    image = np.zeros((len(text), len(encoder)))
    for own, cross in zip(pairs["decoder"], pairs["cross"], strict=True):
        text, image = text + led(own) @ text, image + led(own) @ image
        image = image + normalised(text).T @ led(cross) @ encoder
    return image
