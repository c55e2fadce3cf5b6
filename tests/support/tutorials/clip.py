"""Slow reference loop of Grad-CAM for CLIP: one forward and backward pass per entry of a caption."""

from tests.support.oracles import vision

CAPTION = "a man in a red jacket"
LAYERS = ["vision_model.encoder.layers.2.layer_norm1", "vision_model.encoder.layers.1", "vision_model.pre_layrnorm"]


def tutorial_seeds(adapter):
    """The direction of each entry by an own text forward: caption, each token left out, the phrase alone."""
    tokenizer = adapter.tokenizer
    whole = vision.text_embedding(adapter.model, tokenizer, CAPTION)
    count = len(tokenizer(CAPTION)["input_ids"]) - 2
    left_out = [whole - vision.text_embedding(adapter.model, tokenizer, CAPTION, [i + 1]) for i in range(count)]
    # The phrase is its tokens as they stand in the caption, the blank before them included.
    phrase = vision.text_embedding(adapter.model, tokenizer, " red jacket")
    return [whole, *left_out, phrase]


def run_tutorial(adapter, image, layer):
    pixels = adapter.image_processor(image, return_tensors="pt")["pixel_values"].to(adapter.dtype)
    tutorial = vision.Tutorial(adapter.model, pixels)
    return [tutorial.run(seed, layer) for seed in tutorial_seeds(adapter)]
