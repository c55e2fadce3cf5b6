"""Save and load an explanation: figures (PNG), maps.npz and explanation.json, written atomically."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from grounding.core import files
from grounding.core.errors import GroundingError, OptionError, OutputError
from grounding.core.files import slug
from grounding.core.geometry import DETAIL, OVERVIEW, Geometry
from grounding.core.images import ADDRESS, ImageError, Picture, open_image
from grounding.core.printable import escape
from grounding.core.registry import did_you_mean
from grounding.explanation import png, serialization
from grounding.explanation.explanation import SCHEMA_VERSION, Entry, Explanation
from grounding.explanation.inspection import CHANNELS
from grounding.explanation.reading_order import token_indices
from grounding.explanation.serialization import to_json

if TYPE_CHECKING:
    from grounding.explanation.inspection import Inspection

__all__ = ["WRITE", "OutputError", "check_output", "listed", "load", "save", "slug", "to_json"]

FIGURE, STRIP, INSPECTION, MAPS = "figure.png", "strip.png", "inspect.png", "maps.npz"
PICTURE, JSON = "picture.png", "explanation.json"
NAMES = (FIGURE, STRIP, INSPECTION, MAPS, PICTURE, JSON)
WRITE = ("png", "npz", "json")
# Kinds of files: key in the result of `save` -> key in the JSON.
IN_JSON = {"png": "figure", "strip": "strip", "inspect": "inspect", "npz": "maps", "picture": "picture", "json": "json"}
# Kinds of overlays: beginning of the key in the result of `save` -> the view; in the JSON their plural.
OVERLAYS = {"overlay": DETAIL, "overview": OVERVIEW}


def check_output(directory: str | Path) -> Path:
    """Check, before any work, that `save` can write into a folder; return the folder unchanged.

    The folder may be missing, empty, or hold an earlier result (its files are marked). Files that grounding did not
    write are never replaced. Raises OutputError (a GroundingError and an OSError).
    """
    return files.check_output(directory, NAMES)


def save(
    explanation: Explanation,
    directory: str | Path,
    write: Sequence[str] = WRITE,
    *,
    per_token: bool = False,
    inspections: Sequence[Inspection] = (),
    channels: int = CHANNELS,
    **figure_options: Any,
) -> dict[str, Path]:
    """Write an explanation into `directory`, atomically, and return the files by kind.

    Parameters
    ----------
    write: kinds of files, among png, npz and json.
    per_token: with png, also write one overlay per entry and method that depends on the text: `03_jacket.png`.
    inspections: with png, draw these in inspect.png (see `grounding.inspect`), with the strongest `channels` of each.
    figure_options: those of `FigureOptions`.

    With png, a generated or forced text also gets strip.png. With json, an image that has no file of its own is saved
    beside it. The keys of the result are those of `write`, `strip`, `inspect` and, for entry 3 by gradcam,
    `overlay:3:gradcam`, in the second view of an image `overview:3:gradcam`. An earlier result in the folder is
    replaced; its files that are not written again are removed, so that a folder never holds parts of two results.
    Raises OutputError, OptionError.
    """
    chosen = _chosen(write)
    folder = check_output(directory)
    overlays = OVERLAYS if per_token and "png" in chosen else {}
    named = {
        f"{kind}:{entry}:{key}": name
        for kind, view in overlays.items()
        for (entry, key), name in png.overlay_names(explanation, view).items()
    }
    png.check_overlays(folder, named.values())
    contents: dict[str, bytes] = {}
    if "png" in chosen:
        from grounding.explanation.figures.options import FigureOptions  # imports matplotlib

        options = FigureOptions.of(figure_options)
        contents[FIGURE] = png.figure_png(explanation, options)
        if explanation.origin != "given" and token_indices(explanation):
            contents[STRIP] = png.strip_png(explanation, options)
        if inspections:
            contents[INSPECTION] = png.inspection_png(inspections, channels, options)
        if named:
            contents.update(png.overlay_pngs(explanation, options))
    if "npz" in chosen:
        contents[MAPS] = _npz(explanation)
    if "json" in chosen:
        if _needs_copy(explanation.image):
            contents[PICTURE] = png.image_png(explanation.image.pil)
        contents[JSON] = _json(explanation, folder, contents, named)
    try:
        files.write_together(folder, contents, (*NAMES, *png.earlier_overlays(folder)))
    except OSError as error:
        raise OutputError(
            f"cannot write into {escape(folder)}: {error.strerror or error}; nothing was changed"
        ) from None
    kinds = {"png": FIGURE, "strip": STRIP, "inspect": INSPECTION, "npz": MAPS, "json": JSON} | named
    return {kind: folder / name for kind, name in kinds.items() if name in contents}


def listed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Files by kind, as `save` returns them, in the form of the JSON.

    `overlays` maps the index of an entry to a file, or to {method key: file} if there are several methods; `overviews`
    likewise.
    """
    listing: dict[str, Any] = {IN_JSON[kind]: str(name) for kind, name in saved.items() if kind in IN_JSON}
    for one in OVERLAYS:
        found = [(*kind.split(":", 2)[1:], str(name)) for kind, name in saved.items() if kind.startswith(f"{one}:")]
        several = len({key for _, key, _ in found}) > 1
        for entry, key, name in found:
            own = listing.setdefault(f"{one}s", {})
            if several:
                own.setdefault(entry, {})[key] = name
            else:
                own[entry] = name
    return listing


def _chosen(write: Sequence[str]) -> set[str]:
    wanted = [write] if isinstance(write, str) else list(write)
    for kind in wanted:
        if kind not in WRITE:
            raise OptionError(f"cannot write {kind!r}{did_you_mean(kind, list(WRITE))} (there are: {', '.join(WRITE)})")
    if not wanted:
        raise OptionError(f"nothing to write (there are: {', '.join(WRITE)})")
    return set(wanted)


def _npz(explanation: Explanation) -> bytes:
    """The maps as NPZ: the same bytes for the same explanation (no time stamps), without pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays(explanation).items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, entry.getvalue())
    return buffer.getvalue()


def arrays(explanation: Explanation) -> dict[str, np.ndarray]:
    """The arrays of maps.npz by name.

    `maps/<key>`: raw signed maps (entries, rows, columns), or (1, rows, columns) where `text_conditioned` is False.
    Of an image with two views `maps/<key>/overview`, `geometry/overview/*` and `seen/overview` are of the second.
    `keys`, `text_conditioned`: one per method. `labels`, `kinds`, `starts`, `ends`, `token_ids` (-1: none), `scores`:
    one per entry. `origin`: origin of the caption. `geometry/*`: as in `Geometry`; `seen`: (x0, y0, x1, y1), original
    pixels. For a generated text: `probabilities` (NaN: none), one per entry, and `alternatives/labels`, `/token_ids`
    (-1) and `/probabilities` (NaN where an entry has fewer), (entries, most alternatives). NumPy strips zero characters
    from the end of texts; the JSON has the complete labels.
    """
    entries, methods = explanation.entries, explanation.methods.values()
    return {
        "schema_version": np.array(SCHEMA_VERSION),
        "caption": np.array(explanation.caption, dtype=np.str_),
        "labels": np.array([e.label for e in entries], dtype=np.str_),
        "kinds": np.array([e.kind for e in entries], dtype=np.str_),
        "starts": np.array([e.start for e in entries], dtype=np.int64),
        "ends": np.array([e.end for e in entries], dtype=np.int64),
        "token_ids": np.array([-1 if e.token_id is None else e.token_id for e in entries], dtype=np.int64),
        "scores": np.array([e.score for e in entries], dtype=np.float64),
        "origin": np.array(explanation.origin, dtype=np.str_),
        **_probabilities(entries),
        "keys": np.array([m.key for m in methods], dtype=np.str_),
        "text_conditioned": np.array([m.text_conditioned for m in methods], dtype=np.bool_),
        **_geometry_arrays(explanation.geometry),
        **{_member(m.key): m.maps for m in methods},
        **({} if explanation.overview is None else _geometry_arrays(explanation.overview, f"/{OVERVIEW}")),
        **{_member(m.key, OVERVIEW): m.overview for m in methods if m.overview is not None},
    }


def _geometry_arrays(geometry: Geometry, view: str = "") -> dict[str, np.ndarray]:
    fields = {f"geometry{view}/{k}": np.array(v) for k, v in geometry.to_dict().items() if v is not None}
    return {f"seen{view}": np.array(geometry.seen, dtype=np.float64), **fields}


def _probabilities(entries: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Probabilities, and alternatives as tables that are padded for entries with fewer alternatives."""
    if all(e.probability is None and not e.alternatives for e in entries):
        return {}
    shape = len(entries), max(len(e.alternatives) for e in entries)
    labels = [[*(a.label for a in e.alternatives), *[""] * (shape[1] - len(e.alternatives))] for e in entries]
    token_ids, probabilities = np.full(shape, -1, np.int64), np.full(shape, np.nan)
    for row, entry in enumerate(entries):
        for column, one in enumerate(entry.alternatives):
            token_ids[row, column], probabilities[row, column] = one.token_id, one.probability
    # NaN stands for None.
    return {
        "probabilities": np.array([e.probability for e in entries], dtype=np.float64),
        "alternatives/labels": np.array(labels, dtype=np.str_).reshape(shape),
        "alternatives/token_ids": token_ids,
        "alternatives/probabilities": probabilities,
    }


def _member(key: str, view: str | None = None) -> str:
    """The name of a method's array: its key, with characters escaped that archives or file systems cannot hold."""
    name = "maps/" + quote(key, safe="@:,+=-._ ()", errors="surrogatepass")
    return name if view is None else f"{name}/{view}"


def _json(explanation: Explanation, folder: Path, contents: Mapping[str, bytes], overlays: Mapping[str, str]) -> bytes:
    kinds = {"png": FIGURE, "strip": STRIP, "inspect": INSPECTION, "npz": MAPS, "picture": PICTURE}
    content = to_json(explanation, listed({k: name for k, name in kinds.items() if name in contents} | dict(overlays)))
    content["image"]["relative_path"] = _relative(explanation.image.path, folder)
    # Reveals files of different results in one folder.
    content["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    return serialization.dumps(content).encode("ascii")


def _needs_copy(image: Picture) -> bool:
    """Whether an image has no file to be opened again: it is from memory or from an address."""
    return image.path is None or ADDRESS.match(image.path) is not None


def _relative(path: str | None, folder: Path) -> str | None:
    """Path of the image relative to the result folder: valid when both are moved together."""
    if path is None or ADDRESS.match(path):
        return None
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # another drive
        return None


def load(directory: str | Path) -> Explanation:
    """Load a result saved with json and npz: the same maps, bit for bit, and all fields.

    The image is opened from its path, or from its path relative to the folder, if its sha256 is unchanged. Otherwise
    the explanation has everything but the image, and drawing it raises GroundingError with the reason.
    Raises GroundingError for a folder that is damaged, not a result, or written by a newer version.
    """
    folder = Path(directory)
    content = serialization.parse(_read(folder / JSON, folder), folder / JSON)
    try:
        if "maps" not in content["files"]:
            raise GroundingError(f"{escape(folder)} was saved without maps; save with npz and json to load it again")
        data = _read(folder / MAPS, folder)
        if hashlib.sha256(data).hexdigest() != content["sha256"][MAPS]:
            raise GroundingError(f"{escape(folder / MAPS)} is damaged or belongs to another result than {JSON}")
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            image = _image(content, folder)
            return serialization.from_json(content, lambda key, view: archive[_member(key, view)], image)
    except GroundingError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise GroundingError(f"{escape(folder / JSON)} is damaged: {reason}") from None


def _read(path: Path, folder: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GroundingError(f"{escape(folder)} is not a result folder of grounding: {path.name}: {reason}") from None


class _Absent(Image.Image):
    """Placeholder of a missing image: any use raises GroundingError with the reason."""

    def __init__(self, reason: str) -> None:
        object.__setattr__(self, "__reason__", reason)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        raise GroundingError(self.__reason__)

    def __repr__(self) -> str:
        return f"<{self.__reason__}>"


def _image(content: Mapping[str, Any], folder: Path) -> Picture:
    about = content["image"]
    path, digest, crop = about["path"], about["sha256"], about.get("crop")
    if "picture" in content["files"]:
        opened = _opened(folder / PICTURE, content["sha256"][PICTURE])
    else:
        opened = _opened(Path(path), digest, crop)
        if isinstance(opened, str) and about.get("relative_path"):
            moved = _opened(folder / about["relative_path"], digest, crop)
            opened = opened if isinstance(moved, str) else moved
    if isinstance(opened, str):
        image: Image.Image = _Absent(f"the image of this result cannot be drawn: {opened}")
    else:
        image = opened.pil
    box = None if crop is None else tuple(crop)
    return Picture(image, about["width"], about["height"], path, digest, tuple(about["warnings"]), box)


def _opened(path: Path, digest: str, crop: Sequence[int] | None = None) -> Picture | str:
    """The image at `path`, if it has this sha256; else the reason."""
    try:
        image = open_image(path)
        if image.sha256 == digest and crop is not None:
            image = image.cropped(crop)
    except ImageError as error:
        return str(error)
    return image if image.sha256 == digest else f"{escape(path)} has changed since (sha256 differs)"
