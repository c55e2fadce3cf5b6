"""Adapters of the supported architectures, and `load`, which makes the adapter of a checkpoint.

To add an architecture: a folder with its subclass of `grounding.adapter.base.Adapter`, and one line in
`adapters/table.py`. A package of your own uses the entry point group `grounding.adapters` instead of that line.
`load` finds the adapter by `config.architectures` first, then by `config.model_type`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapters.table import ADAPTERS

if TYPE_CHECKING:
    from grounding.adapter.base import Adapter

__all__ = ["ADAPTERS", "load"]


def load(checkpoint: str | None = None, **options: Any) -> Adapter:
    """Load a checkpoint, a Hugging Face id or a folder, and return its adapter; None loads the embedded demo model.

    Options: `device` ("auto" = cuda, mps, cpu), `dtype` ("float32", "float16", "bfloat16"; default float32 on CPU, the
    checkpoint's own elsewhere), `revision`, `trust_remote_code` (needs a pinned `revision`), `local_files_only`.
    Raises ModelError of one line for an unknown or unreachable id, an unsupported architecture, or missing weights.
    """
    from adapters.loading import load as load_checkpoint

    return load_checkpoint(checkpoint, **options)


def __getattr__(name: str) -> Any:
    # `from adapters import ClipAdapter` imports this family only.
    for target in (ADAPTERS[key] for key in ADAPTERS if ADAPTERS.target(key).endswith(f":{name}")):
        return target
    raise AttributeError(f"module 'adapters' has no attribute {name!r}")
