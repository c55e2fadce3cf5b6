"""Adapters for SigLIP (`SiglipModel`) and SigLIP 2 NaFlex (`Siglip2Model`)."""

from adapters.siglip.adapter import SiglipAdapter
from adapters.siglip.naflex import Siglip2Adapter

__all__ = ["Siglip2Adapter", "SiglipAdapter"]
