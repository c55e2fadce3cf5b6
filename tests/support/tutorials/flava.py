"""Slow reference loop for FLAVA: one forward and backward pass per token, by target kind."""

from grounding import Selection
from tests.support.images import noise
from tests.support.oracles.fusion import Tutorial

TEXT = "a man in a red jacket"
PATCHES = 16
FUSION = {
    "fusion:-1.in": "flava.multimodal_model.encoder.layer.2.layernorm_before",
    "fusion:0": "flava.multimodal_model.encoder.layer.0",
}


def loop(adapter, kind, layer, image=None):
    """The caption (where it has a score of its own), then each token."""
    pixels = adapter.image_processor(image or noise(50, 40), return_tensors="pt")["pixel_values"].to(adapter.dtype)
    ids = adapter.tokenizer(TEXT)["input_ids"]
    tutorial = Tutorial(adapter.model, pixels, ids)
    places = [*([] if kind == "logit" else [None]), *range(1, len(ids) - 1)]
    return [(*tutorial.run(kind, layer, place), tutorial.compared) for place in places]


def entries(kind):
    return Selection(caption=kind != "logit")


def patches(features, first=1):
    """The patches of one image: (P, D), from a sequence or from a convolution's (D, rows, columns)."""
    return features.reshape(len(features), -1).T if features.ndim == 3 else features[first : first + PATCHES]
