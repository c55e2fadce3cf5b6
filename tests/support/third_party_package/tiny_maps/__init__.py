"""A distribution of somebody else: a model type of its own, its adapter, and a method."""
