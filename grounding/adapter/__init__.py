"""The contract between the engine and an architecture, and tools for writing adapters."""

from grounding.adapter.base import Adapter, ModelInfo

__all__ = ["Adapter", "ModelInfo"]
