"""Adapter for BLIP image-text retrieval (`BlipForImageTextRetrieval`)."""

from adapters.blip.adapter import BlipAdapter

__all__ = ["BlipAdapter"]
