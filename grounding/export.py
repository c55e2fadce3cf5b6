"""An explanation as files: figure.png, maps.npz, explanation.json; written whole or not at all, and read back."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from grounding import files, manifest
from grounding.errors import GroundingError, OptionError
from grounding.explanation import SCHEMA_VERSION, Explanation
from grounding.files import MARK, OutputError, show, slug
from grounding.images import ADDRESS, ImageError, Picture, open_image
from grounding.manifest import to_json
from grounding.registry import did_you_mean

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

__all__ = ["WRITE", "OutputError", "check_output", "load", "save", "slug", "to_json"]

FIGURE, MAPS, PICTURE, JSON = "figure.png", "maps.npz", "picture.png", "explanation.json"
NAMES = (FIGURE, MAPS, PICTURE, JSON)
WRITE = ("png", "npz", "json")


def check_output(directory: str | Path) -> Path:
    """The folder, if `save` can write into it; to be asked before a model is loaded. It is left as it is.

    Good is a folder that does not exist yet, is empty, or holds results of ours (each file bears a mark); files of
    others stay where they are. Raises OutputError (a GroundingError and an OSError).
    """
    return files.check_output(directory, NAMES)


def save(
    explanation: Explanation, directory: str | Path, write: Sequence[str] = WRITE, **figure_options: Any
) -> dict[str, Path]:
    """Write an explanation into `directory`, whole or not at all, and return the files by kind, in the order of WRITE.

    `write` chooses among png, npz, json; `figure_options` go to `grounding.render.figure`. Earlier results there are
    replaced; those not written again are removed, so that a folder never holds parts of two results. With `json`, a
    picture that has no file of its own is saved beside it. Raises OutputError, OptionError.
    """
    chosen = _chosen(write)
    folder = check_output(directory)
    contents: dict[str, bytes] = {}
    if "png" in chosen:
        contents[FIGURE] = _figure(explanation, figure_options)
    if "npz" in chosen:
        contents[MAPS] = _npz(explanation)
    if "json" in chosen:
        if _needs_copy(explanation.picture):
            contents[PICTURE] = _png(explanation.picture)
        contents[JSON] = _json(explanation, folder, contents)
    try:
        files.write_together(folder, contents, NAMES)
    except OSError as error:
        raise OutputError(f"cannot write into {show(folder)}: {error.strerror or error}; nothing was changed") from None
    names = dict(zip(WRITE, (FIGURE, MAPS, JSON), strict=True))
    return {kind: folder / name for kind, name in names.items() if kind in chosen}


def _chosen(write: Sequence[str]) -> set[str]:
    wanted = [write] if isinstance(write, str) else list(write)
    for kind in wanted:
        if kind not in WRITE:
            raise OptionError(f"cannot write {kind!r}{did_you_mean(kind, list(WRITE))} (there are: {', '.join(WRITE)})")
    if not wanted:
        raise OptionError(f"nothing to write (there are: {', '.join(WRITE)})")
    return set(wanted)


def _figure(explanation: Explanation, options: Mapping[str, Any]) -> bytes:
    # matplotlib is slow to import, and not needed for maps alone.
    from grounding.render import figure

    made = figure(explanation, **options)
    buffer = io.BytesIO()
    # Not savefig: it would read the user's own matplotlib settings.
    cast("FigureCanvasAgg", made.canvas).print_png(buffer, metadata={"Software": MARK})
    return buffer.getvalue()


def _png(picture: Picture) -> bytes:
    buffer, mark = io.BytesIO(), PngInfo()
    mark.add_text("Software", MARK)
    picture.image.save(buffer, "PNG", pnginfo=mark)
    return buffer.getvalue()


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
    `token_ids` (-1: none), `scores`: one per entry. `geometry/*`: as in `Geometry`; `seen`: (x0, y0, x1, y1), original
    pixels. A NumPy text loses zero characters at its end; the JSON has labels as they are.
    """
    entries, columns = explanation.entries, explanation.columns.values()
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
        "keys": np.array([c.key for c in columns], dtype=np.str_),
        "text_conditioned": np.array([c.text_conditioned for c in columns], dtype=np.bool_),
        "seen": np.array(explanation.geometry.seen, dtype=np.float64),
        **geometry,
        **{_member(key): column.maps for key, column in explanation.columns.items()},
    }


def _member(key: str) -> str:
    """The name of a method's array: keys as they are, save for signs that no archive or file system likes."""
    return "maps/" + quote(key, safe="@:,+=-._ ()", errors="surrogatepass")


def _json(explanation: Explanation, folder: Path, contents: Mapping[str, bytes]) -> bytes:
    named = {"figure": FIGURE, "maps": MAPS, "picture": PICTURE}
    content = to_json(explanation, {kind: name for kind, name in named.items() if name in contents})
    content["image"]["relative_path"] = _relative(explanation.picture.path, folder)
    # A folder that was cut off between two files shows by this.
    content["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    return manifest.dumps(content).encode("ascii")


def _needs_copy(picture: Picture) -> bool:
    """Pictures from memory have no file, those from an address none that would be opened again."""
    return picture.path is None or ADDRESS.match(picture.path) is not None


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
    content = manifest.parse(_read(folder / JSON, folder), folder / JSON)
    try:
        if "maps" not in content["files"]:
            raise GroundingError(f"{show(folder)} was saved without maps; save with npz and json to load it again")
        data = _read(folder / MAPS, folder)
        if hashlib.sha256(data).hexdigest() != content["sha256"][MAPS]:
            raise GroundingError(f"{show(folder / MAPS)} is damaged or belongs to another result than {JSON}")
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return manifest.from_json(content, lambda key: archive[_member(key)], _picture(content, folder))
    except GroundingError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise GroundingError(f"{show(folder / JSON)} is damaged: {reason}") from None


def _read(path: Path, folder: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GroundingError(f"{show(folder)} is no result folder of grounding: {path.name}: {reason}") from None


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


def _picture(content: Mapping[str, Any], folder: Path) -> Picture:
    about = content["image"]
    path, digest = about["path"], about["sha256"]
    if "picture" in content["files"]:
        found = _opened(folder / PICTURE, content["sha256"][PICTURE])
    else:
        found = _opened(Path(path), digest)
        if isinstance(found, str) and about.get("relative_path"):
            moved = _opened(folder / about["relative_path"], digest)
            found = found if isinstance(moved, str) else moved
    image = _Absent(f"the picture of this result cannot be drawn: {found}") if isinstance(found, str) else found.image
    return Picture(image, about["width"], about["height"], path, digest, tuple(about["warnings"]))


def _opened(path: Path, digest: str) -> Picture | str:
    """The picture, if it is the one with this sha256; else why not."""
    try:
        picture = open_image(path)
    except ImageError as error:
        return str(error)
    return picture if picture.sha256 == digest else f"{show(path)} has changed since (sha256 differs)"
