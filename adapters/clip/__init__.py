"""CLIP-style dual encoders."""

from adapters.clip.adapter import ClipAdapter

__all__ = ["ClipAdapter"]
