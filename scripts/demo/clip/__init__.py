"""The demo CLIP: model, training and scores."""
