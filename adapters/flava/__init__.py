"""FLAVA: dual encoder with a multimodal (fusion) encoder."""

from adapters.flava.adapter import FlavaAdapter

__all__ = ["FlavaAdapter"]
