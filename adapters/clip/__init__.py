"""Adapter for CLIP (`CLIPModel`)."""

from adapters.clip.adapter import ClipAdapter

__all__ = ["ClipAdapter"]
