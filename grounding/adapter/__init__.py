"""The contract between engine and architecture, and the tools an adapter is written with."""

from grounding.adapter.base import Adapter, ModelInfo

__all__ = ["Adapter", "ModelInfo"]
