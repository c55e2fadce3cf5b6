"""Load a checkpoint by Hugging Face id or folder and make its adapter; every failure is a ModelError of one line."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from adapters.shared.tokenization import check_tokenizer
from adapters.table import ADAPTERS, ENDINGS, MODEL_TYPES
from grounding.adapter.base import Adapter, ModelInfo
from grounding.core.demo import demo_folder, demo_model
from grounding.core.errors import ModelError
from grounding.core.hub import hub_answers, quiet
from grounding.core.printable import escape, one_line

LOGGERS = ("transformers", "huggingface_hub", "huggingface_hub.utils._http", "httpx")
UNREACHABLE = "no hub could be reached and it is not in the local cache; give the folder of a checkpoint instead"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by id or folder, with the arguments of `from_pretrained`; its parts are loaded on request.

    All methods raise ModelError of one line.
    """

    id: str
    device: torch.device
    dtype: torch.dtype | str
    revision: str | None = None
    trust_remote_code: bool = False
    local_files_only: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for any `from_pretrained`."""
        return {
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self.local_files_only,
        }

    def config(self) -> Any:
        """The model's configuration."""
        with _as_model_error(self.id, "configuration"):
            try:
                return AutoConfig.from_pretrained(self.id, **self.options)
            except ValueError:
                # A model type that transformers does not know: the adapter's module registers it when it is imported.
                content, _ = PreTrainedConfig.get_config_dict(self.id, **self.options)
                known = [name for name in content.get("architectures") or () if name in ADAPTERS]
                if not known:
                    raise
                _ = ADAPTERS[known[0]]
                return AutoConfig.from_pretrained(self.id, **self.options)

    def model(self, model_class: Any, unused: tuple[str, ...] = ()) -> Any:
        """The model with its weights, on its device. Raises ModelError also for missing weights, unless their names
        begin with one of `unused`: no score depends on those."""
        with _as_model_error(self.id, "weights"):
            loaded: Any = model_class.from_pretrained(
                self.id, dtype=self.dtype, output_loading_info=True, **self.options
            )
        model, info = loaded
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(unused))
        if missing:
            raise ModelError(
                f"{self.id}: {len(missing)} weights are missing ({', '.join(missing[:3])}, ...); they would be random "
                f"and the maps meaningless: is this a {model_class.__name__} checkpoint?"
            )
        return model.to(self.device)

    def image_processor(self) -> Any:
        """The image processor."""
        with _as_model_error(self.id, "image processor"):
            return AutoImageProcessor.from_pretrained(self.id, **self.options)

    def tokenizer(self) -> Any:
        """The tokenizer."""
        with _as_model_error(self.id, "tokenizer"):
            return AutoTokenizer.from_pretrained(self.id, **self.options)

    def info(self, model: PreTrainedModel, image_processor: Any) -> ModelInfo:
        """Provenance of the model: its name, the commit that was loaded if known, and the processor's settings."""
        revision = getattr(model.config, "_commit_hash", None) or self.revision
        folder = Path(self.id).resolve()
        # The embedded models have the same name in a checkout and in an installed wheel.
        name = f"demo-{folder.name}" if folder.parent == (demo_folder() / "models").resolve() else self.id
        return replace(model_info(model, image_processor), id=name, revision=revision)


def check_model(adapter: Adapter, model: Any, *classes: type) -> None:
    """Raise ModelError if a model is of none of `classes`."""
    if not isinstance(model, classes):
        wanted = " or ".join(each.__name__ for each in classes)
        raise ModelError(f"{type(adapter).__name__} needs a {wanted}, got {type(model).__name__}")


def own_parts(
    adapter: Adapter, model: Any, classes: tuple[type, ...], processor: Any, tokenizer: Any, image_processor: Any
) -> tuple[Any, Any]:
    """Tokenizer and image processor for an adapter around a model of one of `classes`, from a processor or given apart.

    The tokenizer is a copy, because tokenizing changes its settings. Raises ModelError for a model of another class, a
    missing part, or a tokenizer without character offsets.
    """
    name = type(adapter).__name__
    check_model(adapter, model, *classes)
    if processor is None and (tokenizer is None or image_processor is None):
        raise ModelError(f"{name} needs a processor, or a tokenizer and an image_processor")
    tokenizer = copy.deepcopy(tokenizer or processor.tokenizer)
    check_tokenizer(tokenizer)
    return tokenizer, image_processor or processor.image_processor


def model_info(model: PreTrainedModel, image_processor: Any) -> ModelInfo:
    """Provenance of a model that was not loaded by name: its `name_or_path` or class, type, processor settings."""
    settings = image_processor.to_dict() if hasattr(image_processor, "to_dict") else {"type": repr(image_processor)}
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return ModelInfo(id=name, type=model.config.model_type, processor=settings)


def load(
    checkpoint: str | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> Adapter:
    """Load a checkpoint, see `adapters.load`."""
    if trust_remote_code and revision is None:
        raise ModelError("running a checkpoint's own code needs a pinned revision: add revision=<commit>")
    chosen = choose_device(device)
    source = Checkpoint(
        id=str(checkpoint) if checkpoint is not None else str(demo_model()),
        device=chosen,
        dtype=_dtype(dtype, chosen),
        revision=revision,
        trust_remote_code=trust_remote_code,
        local_files_only=local_files_only,
    )
    _check_folder(source.id)
    if not (local_files_only or Path(source.id).is_dir() or hub_answers()):
        source = replace(source, local_files_only=True)  # else the client retries for minutes
    adapter_class = find_adapter(source.config(), source.id)
    return adapter_class.from_checkpoint(source)


def find_adapter(config: Any, name: str) -> Any:
    """The adapter class for a configuration, by architecture, then by model type.

    Raises ModelError naming the supported ones.
    """
    own = config.architectures or []
    by_ending = [known for name in own for end, known in ENDINGS.items() if name.endswith(end)]
    for architecture in [*own, *by_ending, MODEL_TYPES.get(config.model_type, "")]:
        if architecture in ADAPTERS:
            return ADAPTERS[architecture]
    what = ", ".join(config.architectures or []) or f"model type {config.model_type!r}"
    raise ModelError(
        f"{escape(name)}: {what} is not supported (there are: {', '.join(ADAPTERS)}); "
        "to add an architecture see docs/adapters.md"
    )


def choose_device(device: str) -> torch.device:
    """The torch device of this name; `auto` is the first available of cuda, mps, cpu. Raises ModelError for a device
    that cannot be used."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise RuntimeError("it has no data")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {one_line(error, 100)}") from None
    return chosen


def _dtype(name: str | None, device: torch.device) -> torch.dtype | str:
    if name is None:
        # On a CPU half-precision weights are up-cast, or small gradients would underflow.
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise ModelError(f"unknown dtype {name!r} (there are: {', '.join(DTYPES)})")
    return DTYPES[name]


def _check_folder(name: str) -> None:
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1
    if path.exists() and not path.is_dir():
        raise ModelError(f"model {escape(name)!r} is a file: give its folder")
    if looks_local and not path.is_dir():
        raise ModelError(f"no model folder {escape(name)!r}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"model folder {escape(name)!r} has no config.json")


@contextlib.contextmanager
def _as_model_error(name: str, part: str) -> Iterator[None]:
    """Raise any loading error as a ModelError of one line, and silence the loggers of transformers and the hub."""
    with quiet(*LOGGERS):
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"cannot load the {part} of {escape(name)!r}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The cause of a known error in plain words; of others the error's own message."""
    text = " ".join(str(error).split())
    known = {
        "trust_remote_code": "it needs code of its own, which is not run; if you trust it, load it from Python with "
        "trust_remote_code=True and a pinned revision",
        "gated repo": "it is gated: accept its terms on the hub and log in (`hf auth login`)",
        "couldn't connect": UNREACHABLE,
        "cannot find the requested files in the disk cache": UNREACHABLE,
        "couldn't find them in the cached files": UNREACHABLE,
        "is not a local folder and is not a valid model identifier": "no such model on the hub, and no such folder",
        "Repository Not Found": "no such model on the hub",
        "requires the SentencePiece library": "its tokenizer needs sentencepiece: pip install sentencepiece protobuf",
        "outgoing traffic has been disabled": "offline mode is on (HF_HUB_OFFLINE) and it is not in the local cache",
    }
    for sign, reason in known.items():
        if sign in text:
            return reason
    return one_line(error)
