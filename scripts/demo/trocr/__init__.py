"""The demo TrOCR: model, training and scores."""
