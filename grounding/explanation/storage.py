"""An explanation as files: PNG, maps.npz, explanation.json; written whole or not at all, and read back."""

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
from grounding.core.images import ADDRESS, ImageError, Picture, open_image
from grounding.core.printable import escape
from grounding.core.registry import did_you_mean
from grounding.explanation import png, serialization
from grounding.explanation.explanation import SCHEMA_VERSION, Entry, Explanation
from grounding.explanation.reading_order import token_indices
from grounding.explanation.serialization import to_json

if TYPE_CHECKING:
    from grounding.explanation.inspection import Inspection

__all__ = ["WRITE", "OutputError", "check_output", "listed", "load", "save", "slug", "to_json"]

FIGURE, STRIP, INSPECTION, MAPS = "figure.png", "strip.png", "inspect.png", "maps.npz"
PICTURE, JSON = "picture.png", "explanation.json"
NAMES = (FIGURE, STRIP, INSPECTION, MAPS, PICTURE, JSON)
WRITE = ("png", "npz", "json")
# The names of kinds of files, as `save` returns them and as the JSON has them.
IN_JSON = {"png": "figure", "strip": "strip", "inspect": "inspect", "npz": "maps", "picture": "picture", "json": "json"}
OVERLAY = "overlay"


def check_output(directory: str | Path) -> Path:
    """The folder, if `save` can write into it; to be asked before a model is loaded. It is left as it is.

    Good is a folder that does not exist yet, is empty, or holds results of ours (each file bears a mark); files of
    others stay where they are. Raises OutputError (a GroundingError and an OSError).
    """
    return files.check_output(directory, NAMES)


def save(
    explanation: Explanation,
    directory: str | Path,
    write: Sequence[str] = WRITE,
    *,
    per_token: bool = False,
    inspections: Sequence[Inspection] = (),
    channels: int = 8,
    **figure_options: Any,
) -> dict[str, Path]:
    """Write an explanation into `directory`, whole or not at all, and return the files by kind.

    `write` chooses among png, npz, json; `figure_options` go to `grounding.render.figure`. With `png`, a text that the
    model wrote (or was made to) has strip.png besides, and `per_token` adds one overlay per entry and method that sees
    the text: `03_jacket.png`; `inspections` (see `grounding.inspection`) are drawn in inspect.png, with the strongest
    `channels` of each. The kinds are those of `write`, `strip`, `inspect` and, for entry 3 by gradcam,
    `overlay:3:gradcam`.
    Earlier results there are replaced; files of theirs that are not written again are removed, so that a folder never
    holds parts of two results. With `json`, a picture that has no file of its own is saved beside it. Raises
    OutputError, OptionError.
    """
    chosen = _chosen(write)
    folder = check_output(directory)
    overlays = png.overlay_names(explanation) if per_token and "png" in chosen else {}
    png.check_overlays(folder, overlays)
    named = {f"{OVERLAY}:{entry}:{key}": name for (entry, key), name in overlays.items()}
    contents: dict[str, bytes] = {}
    if "png" in chosen:
        contents[FIGURE] = png.figure_png(explanation, figure_options)
        if explanation.origin != "given" and token_indices(explanation):
            contents[STRIP] = png.strip_png(explanation)
        if inspections:
            contents[INSPECTION] = png.inspection_png(inspections, channels, figure_options)
        if overlays:
            contents.update(png.overlay_pngs(explanation, figure_options))
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
    """Files by kind, as `save` returns them, in the form that the JSON has them in.

    `overlays` maps an entry's place to a file, or to {method's key: file} where there are several methods.
    """
    made: dict[str, Any] = {IN_JSON[kind]: str(name) for kind, name in saved.items() if kind in IN_JSON}
    found = [(*kind.split(":", 2)[1:], str(name)) for kind, name in saved.items() if kind.startswith(OVERLAY)]
    if found:
        made["overlays"] = {}
        several = len({key for _, key, _ in found}) > 1
        for entry, key, name in found:
            if several:
                made["overlays"].setdefault(entry, {})[key] = name
            else:
                made["overlays"][entry] = name
    return made


def _chosen(write: Sequence[str]) -> set[str]:
    wanted = [write] if isinstance(write, str) else list(write)
    for kind in wanted:
        if kind not in WRITE:
            raise OptionError(f"cannot write {kind!r}{did_you_mean(kind, list(WRITE))} (there are: {', '.join(WRITE)})")
    if not wanted:
        raise OptionError(f"nothing to write (there are: {', '.join(WRITE)})")
    return set(wanted)


def _npz(explanation: Explanation) -> bytes:
    """The same bytes for the same explanation: no time of writing, no pickle."""
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
    """What maps.npz holds, by name.

    `maps/<key>`: raw signed maps (entries, rows, columns), or (1, rows, columns) for all entries where
    `text_conditioned` is False. `keys`, `text_conditioned`: one per method. `labels`, `kinds`, `starts`, `ends`,
    `token_ids` (-1: none), `scores`: one per entry. `origin`: where the caption is from. `geometry/*`: as in
    `Geometry`; `seen`: (x0, y0, x1, y1), original pixels. Where a model wrote the text: `probabilities` (NaN: none),
    one per entry, and `alternatives/labels`, `/token_ids` (-1) and `/probabilities` (NaN where an entry has fewer),
    (entries, most alternatives). A NumPy text loses zero characters at its end; the JSON has labels as they are.
    """
    entries, columns = explanation.entries, explanation.methods.values()
    geometry = {f"geometry/{k}": np.array(v) for k, v in explanation.geometry.to_dict().items() if v is not None}
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
        **_chances(entries),
        "keys": np.array([c.key for c in columns], dtype=np.str_),
        "text_conditioned": np.array([c.text_conditioned for c in columns], dtype=np.bool_),
        "seen": np.array(explanation.geometry.seen, dtype=np.float64),
        **geometry,
        **{_member(key): column.maps for key, column in explanation.methods.items()},
    }


def _chances(entries: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Probabilities, and the alternatives as tables, filled up where an entry has fewer than another."""
    if all(e.probability is None and not e.alternatives for e in entries):
        return {}
    shape = len(entries), max(len(e.alternatives) for e in entries)
    labels = [[*(a.label for a in e.alternatives), *[""] * (shape[1] - len(e.alternatives))] for e in entries]
    token_ids, chances = np.full(shape, -1, np.int64), np.full(shape, np.nan)
    for row, entry in enumerate(entries):
        for place, one in enumerate(entry.alternatives):
            token_ids[row, place], chances[row, place] = one.token_id, one.probability
    # NaN stands for None.
    return {
        "probabilities": np.array([e.probability for e in entries], dtype=np.float64),
        "alternatives/labels": np.array(labels, dtype=np.str_).reshape(shape),
        "alternatives/token_ids": token_ids,
        "alternatives/probabilities": chances,
    }


def _member(key: str) -> str:
    """The name of a method's array: keys as they are, save for signs that no archive or file system likes."""
    return "maps/" + quote(key, safe="@:,+=-._ ()", errors="surrogatepass")


def _json(explanation: Explanation, folder: Path, contents: Mapping[str, bytes], overlays: Mapping[str, str]) -> bytes:
    kinds = {"png": FIGURE, "strip": STRIP, "inspect": INSPECTION, "npz": MAPS, "picture": PICTURE}
    content = to_json(explanation, listed({k: name for k, name in kinds.items() if name in contents} | dict(overlays)))
    content["image"]["relative_path"] = _relative(explanation.image.path, folder)
    # A folder that was cut off between two files shows by this.
    content["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    return serialization.dumps(content).encode("ascii")


def _needs_copy(image: Picture) -> bool:
    """Pictures from memory have no file, those from an address none that would be opened again."""
    return image.path is None or ADDRESS.match(image.path) is not None


def _relative(path: str | None, folder: Path) -> str | None:
    """The picture as seen from the result folder: found again when both are moved together."""
    if path is None or ADDRESS.match(path):
        return None
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # another drive
        return None


def load(directory: str | Path) -> Explanation:
    """The inverse of `save` with json and npz: the same maps, bit for bit, and all fields.

    The picture is opened again where it was or where it lies as seen from the folder, if its sha256 is still the same.
    Otherwise everything but the picture is there, and drawing raises GroundingError saying what became of it.
    Raises GroundingError for a folder that is damaged, none of ours, or written by a newer version.
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
            return serialization.from_json(content, lambda key: archive[_member(key)], _image(content, folder))
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
        raise GroundingError(f"{escape(folder)} is no result folder of grounding: {path.name}: {reason}") from None


class _Absent(Image.Image):
    """Stands for a picture that is gone: any use of it says so."""

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
        found = _opened(folder / PICTURE, content["sha256"][PICTURE])
    else:
        found = _opened(Path(path), digest, crop)
        if isinstance(found, str) and about.get("relative_path"):
            moved = _opened(folder / about["relative_path"], digest, crop)
            found = found if isinstance(moved, str) else moved
    image = _Absent(f"the picture of this result cannot be drawn: {found}") if isinstance(found, str) else found.pil
    warnings, part = tuple(about["warnings"]), None if crop is None else tuple(crop)
    return Picture(image, about["width"], about["height"], path, digest, warnings, part)


def _opened(path: Path, digest: str, crop: Sequence[int] | None = None) -> Picture | str:
    """The picture, if it is the one with this sha256; else why not."""
    try:
        image = open_image(path)
        if image.sha256 == digest and crop is not None:
            image = image.cropped(crop)
    except ImageError as error:
        return str(error)
    return image if image.sha256 == digest else f"{escape(path)} has changed since (sha256 differs)"
