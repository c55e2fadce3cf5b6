"""Configuration of a batch run (plain values, so any process can compute a shard) and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from grounding.adapter.base import Adapter
from grounding.batch.failure_limit import MAX_IN_A_ROW, MAX_SHARE, FailureLimit
from grounding.batch.requests import IMAGE_ALONE, PROTOCOLS, Captions
from grounding.batch.rows import RunMetadata
from grounding.batch.run_folder import MANIFEST, RunFolder, write_manifest
from grounding.core.errors import DifferentRunError, OptionError
from grounding.core.image_decoding import MAX_PIXELS
from grounding.datasets.open import open_dataset
from grounding.datasets.records import Dataset
from grounding.engine.plan import plan_methods
from grounding.engine.provenance import provenance_of
from grounding.engine.request import BATCH_SIZE, Request
from grounding.engine.selection import Selection

# Loads the adapter in the process that computes; picklable for Ray.
LoadAdapter = Callable[[], Adapter]
SHARD_SIZE = 64
# Methods of a run without `methods`, for models that generate no text.
DEFAULT_METHODS = ("gradcam", "rollout")


@dataclass(frozen=True)
class RunConfig:
    """What a batch run computes, as plain values.

    Parameters
    ----------
    data: a folder or a name of a data set, as `open_dataset` takes them.
    split: split of the data set; None: all of it.
    captions: captions of an image to explain: "first", "all", "none" (the model generates the text), or "image" (one
        row per image, for targets that no text can change, which always have that). None: the default of the model,
        "none" if it generates text, else "all".
    protocols: evaluation protocols whose texts about annotated phrases are explained, too.
    request: what to compute for every text. `methods=None` is the default of the model.
    shard_size: images per shard.
    batch_size: images per forward pass.
    workers: processes that decode images; 0: this process decodes.
    threads: threads of torch; None: the number torch chooses.
    max_pixels: width x height of the largest image that is decoded.
    max_failed: share of the rows that may fail before the run stops early; 1: never stop.

    Raises OptionError for a value out of range or an unknown protocol.
    """

    data: str
    split: str | None = None
    captions: Captions | None = None
    protocols: tuple[str, ...] = PROTOCOLS
    request: Request = field(default_factory=Request)
    shard_size: int = SHARD_SIZE
    batch_size: int = BATCH_SIZE
    workers: int = 1
    threads: int | None = None
    max_pixels: int = MAX_PIXELS
    max_failed: float = MAX_SHARE

    def __post_init__(self) -> None:
        for name, least in (("shard_size", 1), ("batch_size", 1), ("workers", 0), ("max_pixels", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.max_failed <= 1:
            raise OptionError(f"max_failed must be a share of the rows, from 0 to 1, got {self.max_failed}")
        if unknown := [name for name in self.protocols if name not in PROTOCOLS]:
            raise OptionError(f"no protocol {unknown[0]!r} (there are: {', '.join(PROTOCOLS)})")

    def failure_limit(self) -> FailureLimit:
        """A new count of failures with the limits of this run."""
        return FailureLimit(share=self.max_failed, in_a_row=MAX_IN_A_ROW if self.max_failed < 1 else None)

    def dataset(self) -> Dataset:
        """Open the data set. Raises DataError."""
        return open_dataset(self.data, self.split)

    def resolve(self, adapter: Adapter) -> RunConfig:
        """Fill in `captions` and the methods of the request with the defaults of the model, where they are None.

        For a target that no text can change all that is about texts is dropped: captions, protocols, selection of
        entries. Raises TargetError, OptionError if captions are "none" and the model generates no text.
        """
        kind, _ = adapter.check_target(self.request.target)
        if kind in adapter.text_independent:
            request = replace(self.request, select=Selection(), token_target=None)
            request = replace(request, methods=request.methods or DEFAULT_METHODS)
            return replace(self, captions=IMAGE_ALONE, protocols=(), request=request)
        if self.captions == IMAGE_ALONE:
            raise OptionError(f"captions {IMAGE_ALONE!r} need a target that no text can change; {kind} is about a text")
        if self.captions == "none" and not adapter.generates:
            raise OptionError(f"captions 'none' needs a model that generates text; {adapter.info.type} does not")
        default_methods = adapter.default_methods if adapter.generates else DEFAULT_METHODS
        return replace(
            self,
            captions=self.captions or ("none" if adapter.generates else "all"),
            request=replace(self.request, methods=self.request.methods or default_methods),
        )

    def metadata(self, adapter: Adapter) -> RunMetadata:
        """What all rows of the run share. Raises errors of the request: methods, options, layers, target."""
        request = self.request
        calls = plan_methods(adapter, request).calls
        target, token_target = adapter.check_target(request.target, request.token_target)
        about_text = target not in adapter.text_independent
        return RunMetadata.of(adapter, calls, target, token_target if about_text else None, request.seed)


@dataclass(frozen=True)
class RunDescription:
    """A run as described by the process that computes it: fingerprint, metadata of its rows, threads of torch."""

    fingerprint: Mapping[str, Any]
    metadata: RunMetadata
    threads: int


def describe(config: RunConfig, adapter: Adapter, dataset: Dataset, ids: Sequence[str]) -> RunDescription:
    """Describe a run from its resolved configuration. Raises errors of the request, and DataError."""
    metadata = config.metadata(adapter)
    threads = config.threads or torch.get_num_threads()
    return RunDescription(fingerprint(config, adapter, metadata, dataset, ids), metadata, threads)


def fingerprint(
    config: RunConfig, adapter: Adapter, metadata: RunMetadata, dataset: Dataset, ids: Sequence[str]
) -> dict[str, Any]:
    """Everything the rows depend on. A run is resumed only with an equal fingerprint."""
    provenance = {
        name: value for name, value in provenance_of(adapter, config.request.seed).items() if name != "schema_version"
    }
    made = {
        "pictures": len(ids),
        "ids": hashlib.sha256("\n".join(map(repr, ids)).encode("ascii", "backslashreplace")).hexdigest(),
        "data": dataset.digest(),
        "layout": dataset.layout,
        "split": dataset.split,
        "captions": config.captions,
        "protocols": list(config.protocols) if dataset.boxes else [],
        "select": asdict(config.request.select),
        "methods": metadata.methods,
        "target": metadata.target,
        "token_target": metadata.token_target,
        "target_options": dict(config.request.options),
        **provenance,
        "weights": weights_digest(adapter.model),
        "shard_size": config.shard_size,
        "batch_size": config.batch_size,
        "max_pixels": config.max_pixels,
    }
    return dict(json.loads(json.dumps(made, default=str)))


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def begin(
    folder: Path, config: RunConfig, description: RunDescription, dataset: Dataset, ids: Sequence[str]
) -> RunFolder:
    """Write the manifest of a new run, or open the run in `folder` if its fingerprint is the same.

    Raises DifferentRunError with the differences, DataError for an unreadable manifest, OSError.
    """
    if not (folder / MANIFEST).exists():
        manifest = {
            "fingerprint": description.fingerprint,
            "about": asdict(description.metadata),
            "data": {"folder": config.data, "split": config.split, "layout": dataset.layout},
            "threads": description.threads,
            "problems": list(dataset.problems),
            "ids": list(ids),
        }
        write_manifest(folder, manifest)
    run = RunFolder.open(folder)
    check_same(run, description.fingerprint)
    return run


# Digests: their values mean nothing to a reader of the message.
DIGESTS = ("ids", "data", "weights")


def check_same(run: RunFolder, fingerprint: Mapping[str, Any]) -> None:
    """Raises DifferentRunError, with the differences, if the run has another fingerprint."""
    stored = run.manifest["fingerprint"]
    differing = [name for name in {**stored, **fingerprint} if stored.get(name) != fingerprint.get(name)]
    if differing:
        pairs = [(name, _short(stored.get(name)), _short(fingerprint.get(name))) for name in differing]
        differences = "; ".join(
            name if old == new or name in DIGESTS else f"{name}: {old} there, {new} now" for name, old, new in pairs
        )
        raise DifferentRunError(
            f"{run.path} holds another run, which differs in {differences}; resume it with its own options, or choose "
            "another folder"
        )


def _short(value: Any) -> str:
    by_method = isinstance(value, dict) and any(isinstance(one, dict) for one in value.values())
    text = ", ".join(value) if by_method else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]}..."
