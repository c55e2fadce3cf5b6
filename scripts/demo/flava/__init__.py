"""The demo FLAVA: model, training and scores."""
