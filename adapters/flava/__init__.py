"""Adapter for FLAVA (`FlavaModel`, `FlavaForPreTraining`)."""

from adapters.flava.adapter import FlavaAdapter

__all__ = ["FlavaAdapter"]
