"""Slow reference loop for encoder-decoders: one backward pass per token of a forced text."""

from grounding import Selection
from tests.support.images import noise
from tests.support.oracles import decoder

TOKENS = Selection(caption=False, special=True)


def tutorial(adapter, text, layer="encoder.layers.2", image=None):
    """The loop over all tokens of a forced text, the end token included."""
    pixels = adapter.image_processor(image or noise(90, 30), return_tensors="pt")["pixel_values"].to(adapter.dtype)
    ids = [*adapter.tokenizer(text, add_special_tokens=False)["input_ids"], 1]
    loop = decoder.Tutorial(adapter.model, pixels, [0, *ids])
    return [loop.run(row, token, layer) for row, token in enumerate(ids)]
