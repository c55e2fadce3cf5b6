"""Adapter for SigLIP (`SiglipModel`)."""

from adapters.siglip.adapter import SiglipAdapter

__all__ = ["SiglipAdapter"]
