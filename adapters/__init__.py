"""Everything that knows a model by name. To add an architecture: one file, and one line in `_table.py`.

`load` looks a checkpoint up by `config.architectures` first, then by `config.model_type`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapters.table import ADAPTERS

if TYPE_CHECKING:
    from grounding.adapter.base import Adapter

__all__ = ["ADAPTERS", "load"]


def load(checkpoint: str | None = None, **options: Any) -> Adapter:
    """An adapter for a Hugging Face id or folder; without one, the embedded demo model.

    Options: `device` ("auto" = cuda, mps, cpu), `dtype` ("float32", "float16", "bfloat16"; default float32 on CPU, the
    checkpoint's own elsewhere), `revision`, `trust_remote_code` (needs a pinned `revision`), `local_files_only`.
    Raises ModelError, one line: unknown or unreachable id, unsupported architecture, unsafe weights.
    """
    from adapters.loading import load as load_checkpoint

    return load_checkpoint(checkpoint, **options)


def __getattr__(name: str) -> Any:
    # `from adapters import ClipAdapter` for a model the user has already, without importing every family.
    for target in (ADAPTERS[key] for key in ADAPTERS if ADAPTERS.target(key).endswith(f":{name}")):
        return target
    raise AttributeError(f"module 'adapters' has no attribute {name!r}")
