"""grounding shows which part of a picture made an image-text model say a word, and how far that can be believed."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "explain": "grounding.engine",
    "Explanation": "grounding.explanation",
    "inspect": "grounding.inspection",
    "METHODS": "grounding.methods",
    "Selection": "grounding.plan",
    "GroundingError": "grounding.errors",
}
__all__ = ["METHODS", "Explanation", "GroundingError", "Selection", "explain", "inspect"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `--help` and `import grounding` do not import torch.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'grounding' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
