"""Adapter for any `nn.Module` that scores classes."""

from adapters.module.adapter import ModuleAdapter

__all__ = ["ModuleAdapter"]
