"""Slow float64 oracle of BLIP: the model's own forward, a full forward and backward per target, plain loops.

Nothing here uses the project's engine.
"""

import numpy as np
import torch

# Their outputs are the attention weights, on the graph.
DROPOUTS = {
    "vision": "vision_model.encoder.layers.{}.self_attn.dropout",
    "text": "text_encoder.encoder.layer.{}.attention.self.dropout",
    "cross": "text_encoder.encoder.layer.{}.crossattention.self.dropout",
}


class Tutorial:
    """One image and one text, given as the model's own tensors."""

    def __init__(self, model, pixels, ids):
        self.model, self.pixels, self.ids = model, pixels, torch.tensor([ids])
        self.counts = {
            "vision": len(model.vision_model.encoder.layers),
            "text": len(model.text_encoder.encoder.layer),
            "cross": len(model.text_encoder.encoder.layer),
        }

    def run(self, kind, layer, place=None):
        """Score of the whole text (`place` None) or of the token at `place` left out, features and gradient (N, D) of
        `layer`, and by stack the pairs of attention and gradient (H, Q, S) of each block.

        Where a text is compared with one without its token there are two passes: the image is the same in both, and its
        gradients add up; of the text encoder the pass of the whole text counts.
        """
        kept, weights = [], {name: [] for name in DROPOUTS}
        handles = [self.keep(layer, kept)]
        for name, path in DROPOUTS.items():
            handles += [self.keep(path.format(i), weights[name]) for i in range(self.counts[name])]
        try:
            with torch.enable_grad():
                score = self.score(kind, place)
        finally:
            for handle in handles:
                handle.remove()
        self.model.zero_grad()
        score.backward()
        pairs = {}
        for name, found in weights.items():
            count = self.counts[name]
            runs = [found[i::count] for i in range(count)] if kind == "matching" or name == "vision" else []
            pairs[name] = [joined(own if name == "vision" else own[:1]) for own in runs]
        # The last norm runs a second time in a pass, on the CLS alone.
        return score.item(), *joined([one for one in kept if one.ndim > 2]), pairs

    def keep(self, path, found):
        def hook(_module, _args, output):
            output.retain_grad()
            found.append(output)

        return self.model.get_submodule(path).register_forward_hook(hook)

    def score(self, kind, place):
        """The target, computed by the model's own forward."""
        if kind == "norm":
            states = self.model.vision_model(self.pixels).last_hidden_state
            return self.model.vision_proj(states[0, 0]).norm()
        mask = torch.ones_like(self.ids)
        whole = self.of_text(kind, mask)
        if place is None:
            return whole
        mask[0, place] = 0
        return whole - self.of_text(kind, mask)

    def of_text(self, kind, mask):
        found = self.model(self.ids, self.pixels, use_itm_head=kind == "matching", attention_mask=mask).itm_score
        return found[0, 1] - found[0, 0] if kind == "matching" else found[0, 0]


def joined(tensors):
    """A tensor without its batch axis, and the sum of the gradients of all passes."""
    gradients = [np.zeros(one.shape) if one.grad is None else one.grad.numpy() for one in tensors]
    return tensors[0][0].detach().numpy(), sum(gradients)[0]


def albef(attention, gradient, row):
    """ALBEF (Li et al. 2021), its published visualisation: the mean over heads of A (G)+ in one text row: (S,)."""
    heads, _, keys = attention.shape
    return np.array(
        [sum(attention[h, row, s] * max(gradient[h, row, s], 0.0) for h in range(heads)) / heads for s in range(keys)]
    )


def normalised(relevancy):
    """N(R) = rownorm(R - I) + I, an empty row of R - I staying empty: Chefer et al. 2021, eq. 8-9."""
    size = len(relevancy)
    result = np.zeros((size, size))
    for q in range(size):
        rest = [relevancy[q, s] - (q == s) for s in range(size)]
        total = sum(rest)
        for s in range(size):
            result[q, s] = (rest[s] / total if total else 0.0) + (q == s)
    return result


def bimodal_relevance(text, cross, encoder):
    """Chefer et al. 2021, eq. 5-6 and 10, with `encoder` (N, N) for N(R_qq): R_sq (L, N).

    `text` and `cross` are the pairs of attention and gradient (H, Q, S) of each block, the text's own before the image.
    """
    length, keys = cross[0][0].shape[1:]
    among, image = np.eye(length), np.zeros((length, keys))
    for own, other in zip(text, cross, strict=True):
        own, other = led(*own), led(*other)
        among, image = among + own @ among, image + own @ image
        image = image + normalised(among).T @ other @ encoder
    return image


def led(attention, gradient):
    """E_h (A G)+ by loops: (Q, S)."""
    heads, queries, keys = attention.shape
    result = np.zeros((queries, keys))
    for q in range(queries):
        for s in range(keys):
            result[q, s] = sum(max(attention[h, q, s] * gradient[h, q, s], 0.0) for h in range(heads)) / heads
    return result
