"""PNG files of a result, marked as written by grounding: figure, strip, inspection, overlays and copy of the image.

Modules that draw are imported in functions: matplotlib is slow to import, and not needed to store maps.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from grounding.core.errors import OutputError
from grounding.core.files import MARK, is_ours, slug
from grounding.core.geometry import DETAIL
from grounding.core.printable import escape
from grounding.explanation.explanation import Explanation
from grounding.explanation.labels import entry_title

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from grounding.explanation.figures.options import FigureOptions
    from grounding.explanation.inspection import Inspection

OVERLAY = re.compile(r"\d{2,}_.+\.png", re.DOTALL)
# PNG text chunk with the file name of an overlay: a file that the user copied or renamed is never removed.
NAMED = "Title"


def figure_png(explanation: Explanation, options: FigureOptions | Mapping[str, Any]) -> bytes:
    """The side-by-side figure; `options` as an object or as keyword arguments. Raises OptionError, GroundingError."""
    from grounding.explanation.figures.comparison import draw
    from grounding.explanation.figures.options import FigureOptions

    return encode_figure(
        draw(explanation, options if isinstance(options, FigureOptions) else FigureOptions.of(options))
    )


def strip_png(explanation: Explanation, options: FigureOptions) -> bytes:
    """The reading strips of all methods."""
    from grounding.explanation.figures.reading_strip import draw

    return encode_figure(draw(explanation, options))


def inspection_png(inspections: Sequence[Inspection], channels: int, options: FigureOptions) -> bytes:
    """The figure of inspections with the strongest `channels` of each. Raises OptionError."""
    from grounding.explanation.figures.inspection import draw

    return encode_figure(draw(inspections, channels, options))


def encode_figure(figure: Figure) -> bytes:
    """A figure as PNG, independent of the user's matplotlib settings."""
    buffer = io.BytesIO()
    # Not savefig: it would apply the user's matplotlib settings.
    cast("FigureCanvasAgg", figure.canvas).print_png(buffer, metadata={"Software": MARK})
    return buffer.getvalue()


def image_png(image: Image.Image, name: str | None = None) -> bytes:
    """An image as PNG, with its file name in the PNG text if `name` is given."""
    buffer, mark = io.BytesIO(), PngInfo()
    mark.add_text("Software", MARK)
    if name is not None:
        mark.add_text(NAMED, name)
    image.save(buffer, "PNG", pnginfo=mark)
    return buffer.getvalue()


def overlay_names(explanation: Explanation, view: str = DETAIL) -> dict[tuple[int, str], str]:
    """File names of the overlays of a view by (entry, method key): `03_jacket.png`, with several methods
    `03_jacket-key.png`, of the overview `03_jacket-overview.png` or `03_jacket-key-overview.png`.

    Methods that do not depend on the text have no overlay per entry, except of an image as the only entry.
    """
    if view not in explanation.views:
        return {}
    keys, ending = explanation.separate, "" if view == DETAIL else f"-{view}"
    slugs: dict[str, str] = {}
    for key in keys:
        stem, number = slug(key, "method"), 1
        while (name := stem if number == 1 else f"{stem}-{number}") in slugs.values():
            number += 1
        slugs[key] = name
    digits = max(2, len(str(len(explanation.entries) - 1)))
    names = {}
    for i, entry in enumerate(explanation.entries):
        label = slug(entry_title(explanation, entry), entry.kind)
        for key in keys:
            names[i, key] = f"{i:0{digits}}_{label}{'-' + slugs[key] if len(keys) > 1 else ''}{ending}.png"
    return names


def overlay_pngs(explanation: Explanation, options: FigureOptions) -> Iterator[tuple[str, bytes]]:
    """The overlays of all views with their file names."""
    from grounding.explanation.figures.overlays import draw

    for view in explanation.views:
        names = overlay_names(explanation, view)
        for entry, key, image in draw(explanation, options, view):
            yield names[entry, key], image_png(image, names[entry, key])


def earlier_overlays(folder: Path) -> tuple[str, ...]:
    """Names of the overlays of an earlier result in `folder`; none if there is no such folder."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(e.name for e in folder.iterdir() if OVERLAY.fullmatch(e.name) and _has_own_name(e)))


def check_overlays(folder: Path, names: Iterable[str]) -> None:
    """Check that overlays with these names replace no other files. Raises OutputError."""
    earlier = earlier_overlays(folder)
    for name in names:
        path = folder / name
        if name not in earlier and (path.exists() or path.is_symlink()):
            raise OutputError(f"{escape(path)} was not written by grounding and is not replaced; choose another folder")


def _has_own_name(path: Path) -> bool:
    if not is_ours(path):
        return False
    with suppress(OSError, ValueError, SyntaxError), Image.open(path) as image:
        # Some file systems store accented letters in another Unicode form than the one given.
        title = unicodedata.normalize("NFC", str(image.info.get(NAMED, "")))
        return title == unicodedata.normalize("NFC", path.name)
    return False
