"""Parts that several adapters share: image processing, tokenization, text targets, generation, fast paths."""
