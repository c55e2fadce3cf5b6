"""Show which part of an image made an image-text model say a word, and measure how far the map can be believed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grounding.core.errors import GroundingError
    from grounding.engine.explain import explain
    from grounding.engine.inspect import inspect
    from grounding.engine.layers import list_layers
    from grounding.engine.selection import Selection
    from grounding.explanation.explanation import Explanation
    from grounding.methods import METHODS

# Public name -> module. Resolved when first used, so that `--help` and `import grounding` import no torch; `load` by
# its string alone, as `adapters` builds on this package.
_PUBLIC = {
    "explain": "grounding.engine.explain",
    "inspect": "grounding.engine.inspect",
    "list_layers": "grounding.engine.layers",
    "load": "adapters",
    "Explanation": "grounding.explanation.explanation",
    "Selection": "grounding.engine.selection",
    "METHODS": "grounding.methods",
    "GroundingError": "grounding.core.errors",
}
__all__ = [
    "METHODS",
    "Explanation",
    "GroundingError",
    "Selection",
    "__version__",
    "explain",
    "inspect",
    "list_layers",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from grounding.core.version import distribution_version

        return distribution_version()
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'grounding' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
