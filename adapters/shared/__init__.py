"""What several architectures need: image processors, tokenization, targets, generation."""
