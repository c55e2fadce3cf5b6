"""What a batch run computes: by names and numbers, so that any process can do a part of it, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from grounding.adapter.base import Adapter
from grounding.batch.failure_limit import IN_A_ROW, SHARE, FailureLimit
from grounding.batch.requests import PROTOCOLS, Captions
from grounding.batch.rows import RunMetadata
from grounding.batch.run_folder import MANIFEST, RunFolder, write_manifest
from grounding.core.errors import DifferentRunError, OptionError
from grounding.core.image_decoding import MAX_PIXELS
from grounding.datasets.open import open_dataset
from grounding.datasets.records import Dataset
from grounding.engine.plan import for_target, plan_methods
from grounding.engine.provenance import provenance_of
from grounding.engine.request import BATCH_SIZE, Request

# Makes the adapter, in whichever process.
Load = Callable[[], Adapter]
SHARD_SIZE = 64
METHODS = ("gradcam", "rollout")


@dataclass(frozen=True)
class RunConfig:
    """A run. `data` is a folder or a name that `open_dataset` takes; `request` is what to compute of each
    image. `captions` and the methods of the request are None until the model is known (`settled`); `protocols` name the texts about phrases that are explained, too. `shard_size` and
    `batch_size` count pictures. `workers` processes decode pictures; `threads` of torch compute (None: as many as it
    takes by itself). `max_failed` is the part of the rows that may fail before the run is stopped as hopeless (1: all).
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
    max_failed: float = SHARE

    def __post_init__(self) -> None:
        for name, least in (("shard_size", 1), ("batch_size", 1), ("workers", 0), ("max_pixels", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.max_failed <= 1:
            raise OptionError(f"max_failed must be a part of the rows, from 0 to 1, got {self.max_failed}")
        if unknown := [name for name in self.protocols if name not in PROTOCOLS]:
            raise OptionError(f"no protocol {unknown[0]!r} (there are: {', '.join(PROTOCOLS)})")

    def budget(self) -> FailureLimit:
        """When the run is hopeless."""
        return FailureLimit(share=self.max_failed, in_a_row=IN_A_ROW if self.max_failed < 1 else None)

    def dataset(self) -> Dataset:
        """The data set. Raises DataError."""
        return open_dataset(self.data, self.split)

    def settled(self, adapter: Adapter) -> RunConfig:
        """With what depends on the model: one that writes texts is asked for its own, by the methods it shows best.

        Raises OptionError where it shall write a text and cannot.
        """
        if self.captions == "none" and not adapter.generates:
            raise OptionError(f"without captions the model must write its own, and {adapter.info.type} writes no text")
        usual = adapter.default_methods if adapter.generates else METHODS
        return replace(
            self,
            captions=self.captions or ("none" if adapter.generates else "all"),
            request=replace(self.request, methods=self.request.methods or usual),
        )

    def about(self, adapter: Adapter) -> RunMetadata:
        """What all rows will have in common. Raises what is wrong with the methods, options, layers or target."""
        request = self.request
        aimed, own = for_target(adapter, request)
        plan = plan_methods(aimed, own)
        target, token_target = aimed.check_kind(request.target, request.token_target)
        return RunMetadata.of(aimed, plan, target, token_target, request.seed)


@dataclass(frozen=True)
class RunDescription:
    """A run as the process sees it that computes it: its fingerprint, what rows have in common, threads of torch."""

    fingerprint: Mapping[str, Any]
    about: RunMetadata
    threads: int


def describe(config: RunConfig, adapter: Adapter, dataset: Dataset, ids: Sequence[str]) -> RunDescription:
    """Of settled config. Raises what is wrong with the methods, options, layers or target, and DataError."""
    about = config.about(adapter)
    threads = config.threads or torch.get_num_threads()
    return RunDescription(fingerprint(config, adapter, about, dataset, ids), about, threads)


def fingerprint(
    config: RunConfig, adapter: Adapter, about: RunMetadata, dataset: Dataset, ids: Sequence[str]
) -> dict[str, Any]:
    """Everything that the rows depend on. Where two runs lie in one folder they must agree in all of it."""
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
        "methods": about.methods,
        "target": about.target,
        "token_target": about.token_target,
        "target_options": dict(config.request.options),
        **provenance,
        "weights": weights_digest(adapter.model),
        "shard_size": config.shard_size,
        "batch_size": config.batch_size,
        "max_pixels": config.max_pixels,
    }
    return dict(json.loads(json.dumps(made, default=str)))


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def begin(
    folder: Path, config: RunConfig, description: RunDescription, dataset: Dataset, ids: Sequence[str]
) -> RunFolder:
    """The run in a folder: begun by writing its manifest, or the one that is there if it has the same fingerprint.

    Raises DifferentRunError naming what differs, DataError for a manifest that cannot be read, OSError.
    """
    if not (folder / MANIFEST).exists():
        manifest = {
            "fingerprint": description.fingerprint,
            "about": asdict(description.about),
            "data": {"folder": config.data, "split": config.split, "layout": dataset.layout},
            "threads": description.threads,
            "problems": list(dataset.problems),
            "ids": list(ids),
        }
        write_manifest(folder, manifest)
    run = RunFolder.open(folder)
    check_same(run, description.fingerprint)
    return run


# Digests: what stands there says nothing to a reader.
HASHED = ("ids", "data", "weights")


def check_same(run: RunFolder, found: Mapping[str, Any]) -> None:
    """Raises DifferentRunError where a run computes something else than `found` says."""
    there = run.manifest["fingerprint"]
    differing = [name for name in {**there, **found} if there.get(name) != found.get(name)]
    if differing:
        pairs = [(name, _short(there.get(name)), _short(found.get(name))) for name in differing]
        said = "; ".join(
            name if old == new or name in HASHED else f"{name}: {old} there, {new} now" for name, old, new in pairs
        )
        raise DifferentRunError(
            f"{run.path} holds another run, which differs in {said}; resume it as it was, or choose another folder"
        )


def _short(value: Any) -> str:
    named = isinstance(value, dict) and any(isinstance(one, dict) for one in value.values())
    text = ", ".join(value) if named else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]}..."
