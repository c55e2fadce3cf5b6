"""Any torch module that scores classes."""

from adapters.module.adapter import ModuleAdapter

__all__ = ["ModuleAdapter"]
