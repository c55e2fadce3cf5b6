"""Slow float64 oracles for FLAVA: its own forward, one full forward and backward per target.

Nothing here uses the project's engine.
"""

import numpy as np
import torch

ATTENTION = "attention.attention.dropout"  # its output is the attention, on the graph


class Tutorial:
    """One image and one text, given as the model's own tensors.

    `compared` is what the last run kept of the caption without its token: features and gradient of the layer.
    """

    def __init__(self, model, pixels, ids):
        self.model, self.pixels, self.ids = model, pixels, torch.tensor([ids])

    def run(self, kind, layer, place=None):
        """Score of the whole text (`place` None) or of the token at `place`, features and gradient of `layer` without
        the batch axis, and by tower the pairs of attention and gradient (H, Q, S) of each block."""
        kept, towers = [], {"image_model": [], "multimodal_model": []}
        flava = getattr(self.model, "flava", self.model)
        handles = [self.model.get_submodule(layer).register_forward_hook(lambda m, a, out: keep(kept, out))]
        for name, found in towers.items():
            for block in getattr(flava, name).encoder.layer:
                module = block.get_submodule(ATTENTION)
                handles.append(module.register_forward_hook(lambda m, a, out, f=found: keep(f, out)))
        try:
            score = self.score(kind, place)
        finally:
            for handle in handles:
                handle.remove()
        self.model.zero_grad()
        score.backward()
        pairs = {}
        for name, own in towers.items():
            count = len(getattr(flava, name).encoder.layer)
            pairs[name] = [self.joined([own[i], *own[count + i : count + i + 1]], name) for i in range(count)]
        self.compared = [(t[0].detach().numpy(), gradient(t)) for t in kept[1:]]
        return score.item(), *self.joined(kept, layer), pairs

    def joined(self, runs, path):
        """A tensor and its gradient. Where a caption is compared with one that lacks a token there are two passes: the
        image is the same in both, its gradients add up; of the multimodal encoder the caption's own pass counts."""
        counted = runs if "image_model" in path else runs[:1]
        return runs[0][0].detach().numpy(), sum(gradient(run) for run in counted)

    def score(self, kind, place):
        """The target, computed by the model's own forward."""
        flava = getattr(self.model, "flava", self.model)
        out = flava(input_ids=self.ids, pixel_values=self.pixels, attention_mask=torch.ones_like(self.ids))
        if kind == "similarity":
            whole = self.cosine(out, self.text(torch.ones_like(self.ids)))
            return whole if place is None else whole - self.cosine(out, self.text(self.masked(place)))
        if kind == "norm":
            return flava.image_projection(out.image_embeddings).norm()
        if kind == "logit":
            patches = out.image_embeddings.shape[1]
            logits = self.model.mmm_text_head(out.multimodal_embeddings[0, 1 + patches :])
            return logits[place, self.ids[0, place]]
        odds = self.odds(out)
        if place is None:
            return odds
        return odds - self.odds(flava(input_ids=self.ids, pixel_values=self.pixels, attention_mask=self.masked(place)))

    def odds(self, out):
        logits = self.model.itm_head(out.multimodal_embeddings)[0]
        return logits[1] - logits[0]

    def cosine(self, out, text):
        flava = getattr(self.model, "flava", self.model)
        image = flava.image_projection(out.image_embeddings[0, 0])
        return image @ text / (image.norm() * text.norm())

    def text(self, mask):
        flava = getattr(self.model, "flava", self.model)
        with torch.no_grad():
            out = flava.text_model(self.ids, attention_mask=mask).last_hidden_state
            return flava.text_projection(out[0, 0])

    def masked(self, place):
        mask = torch.ones_like(self.ids)
        mask[0, place] = 0
        return mask


def keep(kept, output):
    tensor = output[0] if isinstance(output, tuple) else output
    tensor.retain_grad()
    kept.append(tensor)


def gradient(tensor):
    return np.zeros(tensor.shape[1:]) if tensor.grad is None else tensor.grad[0].numpy()
