"""Adapter for CLIP, MetaCLIP 2, Chinese-CLIP and AltCLIP."""

from adapters.clip.adapter import ClipAdapter

__all__ = ["ClipAdapter"]
