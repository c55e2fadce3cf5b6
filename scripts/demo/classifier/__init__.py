"""The demo classifier: images, training and scores."""
