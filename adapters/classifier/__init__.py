"""Adapter for the image classifiers of transformers."""

from adapters.classifier.adapter import ClassifierAdapter

__all__ = ["ClassifierAdapter"]
