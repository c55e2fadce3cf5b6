"""Provenance of an explanation: versions, model, processor, seed."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from grounding.adapter.base import Adapter
from grounding.core.version import distribution_version
from grounding.explanation.explanation import SCHEMA_VERSION


def provenance_of(adapter: Adapter, seed: int) -> dict[str, Any]:
    """Everything needed to compute the same maps again."""
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {"grounding": distribution_version()}
        | {name: version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "model": adapter.info.id,
        "revision": adapter.info.revision,
        "processor": dict(adapter.info.processor),
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "device": adapter.device.type,
        "seed": seed,
    }
