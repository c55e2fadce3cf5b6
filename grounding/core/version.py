"""Version of the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

# The name `grounding` is taken on the package index.
DISTRIBUTION = "grounding-maps"


def distribution_version() -> str:
    """The version of the installed distribution; "unknown" where the packages are imported from elsewhere."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
