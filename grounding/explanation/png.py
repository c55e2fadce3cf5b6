"""The PNG files of a result, as bytes that bear our mark: figure, strip, overlays and the picture's copy."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from grounding.core.errors import OutputError
from grounding.core.files import MARK, is_ours, slug
from grounding.core.printable import escape
from grounding.explanation.explanation import Explanation
from grounding.explanation.labels import entry_title

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from grounding.explanation.inspection import Inspection

OVERLAY = re.compile(r"\d{2,}_.+\.png", re.DOTALL)
# Each overlay says its own name: one that somebody copied or renamed is theirs, and is never removed.
NAMED = "Title"


def figure_png(explanation: Explanation, options: Mapping[str, Any]) -> bytes:
    """The side-by-side figure; `options` as in `grounding.render.figure`. Raises OptionError."""
    # matplotlib is slow to import, and not needed for maps alone.
    from grounding.explanation.figures.comparison import figure

    return printed(figure(explanation, **options))


def strip_png(explanation: Explanation) -> bytes:
    """The strip of the tokens by every method."""
    from grounding.explanation.figures.reading_strip import strip

    return printed(strip(explanation))


def inspection_png(inspections: Sequence[Inspection], channels: int, options: Mapping[str, Any]) -> bytes:
    """The features behind the maps; `options` are those of the figure, of which the colour map counts."""
    from grounding.explanation.figures.inspection import figure

    return printed(figure(inspections, channels, **{key: options[key] for key in ("cmap",) if key in options}))


def printed(made: Figure) -> bytes:
    """A figure as PNG, the same whatever the user's own settings of matplotlib."""
    buffer = io.BytesIO()
    # Not savefig: it would read the user's own matplotlib settings.
    cast("FigureCanvasAgg", made.canvas).print_png(buffer, metadata={"Software": MARK})
    return buffer.getvalue()


def image_png(image: Image.Image, name: str | None = None) -> bytes:
    """A picture, with its file name inside where it is given."""
    buffer, mark = io.BytesIO(), PngInfo()
    mark.add_text("Software", MARK)
    if name is not None:
        mark.add_text(NAMED, name)
    image.save(buffer, "PNG", pnginfo=mark)
    return buffer.getvalue()


def overlay_names(explanation: Explanation) -> dict[tuple[int, str], str]:
    """File names of the overlays by (entry, method's key): `03_jacket.png`, with several methods `03_jacket-key.png`.

    Methods that do not see the text have no overlay per entry.
    """
    keys = [key for key, column in explanation.methods.items() if not column.shared]
    slugs: dict[str, str] = {}
    for key in keys:
        stem, number = slug(key, "method"), 1
        while (name := stem if number == 1 else f"{stem}-{number}") in slugs.values():
            number += 1
        slugs[key] = name
    digits = max(2, len(str(len(explanation.entries) - 1)))
    made = {}
    for i, entry in enumerate(explanation.entries):
        label = slug(entry_title(explanation, entry), entry.kind)
        for key in keys:
            made[i, key] = f"{i:0{digits}}_{label}{'-' + slugs[key] if len(keys) > 1 else ''}.png"
    return made


def overlay_pngs(explanation: Explanation, options: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The overlays with their names; `options` as in `grounding.render.figure`."""
    from grounding.explanation.figures.overlays import overlays

    names = overlay_names(explanation)
    for entry, key, image in overlays(explanation, **options):
        yield names[entry, key], image_png(image, names[entry, key])


def earlier_overlays(folder: Path) -> tuple[str, ...]:
    """Names of the overlays that an earlier result left in `folder`; none where there is no folder."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(e.name for e in folder.iterdir() if OVERLAY.fullmatch(e.name) and _says_its_name(e)))


def check_overlays(folder: Path, names: Mapping[tuple[int, str], str]) -> None:
    """Raises OutputError where a file of somebody else has the name of an overlay that is to be written."""
    earlier = earlier_overlays(folder)
    for name in names.values():
        path = folder / name
        if name not in earlier and (path.exists() or path.is_symlink()):
            raise OutputError(f"{escape(path)} was not written by grounding and is not replaced; choose another folder")


def _says_its_name(path: Path) -> bool:
    if not is_ours(path):
        return False
    with suppress(OSError, ValueError, SyntaxError), Image.open(path) as image:
        # Some file systems store letters with accents in another form than they were given.
        said = unicodedata.normalize("NFC", str(image.info.get(NAMED, "")))
        return said == unicodedata.normalize("NFC", path.name)
    return False
