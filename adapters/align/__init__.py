"""Adapter for ALIGN (`AlignModel`)."""

from adapters.align.adapter import AlignAdapter

__all__ = ["AlignAdapter"]
