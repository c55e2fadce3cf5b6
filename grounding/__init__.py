"""grounding shows which part of a picture made an image-text model say a word, and how far that can be believed."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "explain": "grounding.engine.explain",
    "Explanation": "grounding.explanation.explanation",
    "inspect": "grounding.engine.inspect",
    "METHODS": "grounding.methods",
    "Selection": "grounding.engine.plan",
    "GroundingError": "grounding.core.errors",
}
__all__ = ["METHODS", "Explanation", "GroundingError", "Selection", "explain", "inspect"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `--help` and `import grounding` do not import torch.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'grounding' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
