"""Explanation: the frozen result of one image and one text, with raw signed patch maps and derived views."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from grounding.core.errors import GroundingError
from grounding.core.geometry import DETAIL, OVERVIEW, Geometry
from grounding.core.images import Picture
from grounding.core.text import Alternative, find_label
from grounding.explanation import maps as mapping
from grounding.explanation.maps import Status
from grounding.explanation.views import VIEWS
from grounding.methods.options import THRESHOLD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
BOX_SIDE = 1024


@dataclass(frozen=True)
class Entry:
    """An explained part: a caption, token, word or phrase (characters [start, end) of the caption), a class, an image.

    `score` is the explained scalar. `token_id` is the id of a token, or of a word of one token; the index of a class.
    A generated or forced token has the `probability` at its position and the next best `alternatives`; a class has
    those of the other classes among the five most probable. The kinds `where` and `contrast` explain a token that was
    not generated: the evidence for `token_id` at characters [start, end), alone or relative to another token.
    """

    label: str
    kind: str
    start: int
    end: int
    score: float
    token_id: int | None = None
    probability: float | None = None
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class MethodMaps:
    """Raw maps of one method at one layer: (entries, rows, columns), or (1, rows, columns) where all entries share one.

    `text_conditioned` is False if the maps do not depend on the text; `status` has one item per stored map.
    `overview` and `overview_status` are those of the image's second view, if it has one.
    """

    key: str
    method: str
    title: str
    layer: str | None
    options: Mapping[str, Any]
    signed: bool
    text_conditioned: bool
    maps: Float[np.ndarray, "entries rows columns"]
    status: tuple[Status, ...]
    overview: Float[np.ndarray, "entries small_rows small_columns"] | None = None
    overview_status: tuple[Status, ...] = ()

    def __repr__(self) -> str:
        return f"<MethodMaps {self.key}: {len(self.maps)} maps of {self.maps.shape[1]} x {self.maps.shape[2]} patches>"

    @property
    def shared(self) -> bool:
        """Whether all entries share one map."""
        return not self.text_conditioned

    def index(self, entry: int) -> int:
        """The index of an entry's map in `maps` and `status`."""
        return 0 if self.shared else entry


@dataclass(frozen=True, eq=False, repr=False)
class PatchMap:
    """One map of an explanation: `explanation["jacket"]`, or `explanation.map("jacket", "relevance")`.

    `overview` is the map of the same entry and method in the image's second view, None if it has one view only:
    `explanation["jacket"].overview.heat()` is in original pixels, too.
    """

    entry: Entry
    method: MethodMaps
    raw: Float[np.ndarray, "rows columns"]
    status: Status
    geometry: Geometry
    overview: PatchMap | None = None

    def __repr__(self) -> str:
        return f"<PatchMap {self.entry.label!r} by {self.method.key}: peak {self.peak}, {self.status.status}>"

    @property
    def view(self) -> Float[np.ndarray, "rows columns"]:
        """The evidence for the entry, on the patch grid: >= 0."""
        threshold = self.method.options.get(THRESHOLD, 0.0)
        return mapping.view(self.raw, signed=self.method.signed, threshold=threshold)

    def heat(self, size: tuple[int, int] | None = None) -> Float[np.ndarray, "height width"]:
        """The view in original pixels, or resampled to `size` (height, width); NaN where unseen."""
        return self.geometry.to_original(self.view, size=size)

    @property
    def peak(self) -> tuple[float, float] | None:
        """Centre of the strongest seen patch, (x, y) in original pixels; None for a degenerate map."""
        return mapping.peak(self.raw, self.geometry) if self.status else None

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """Largest region above half of the range: (x0, y0, x1, y1) in original pixels; None for a degenerate map.

        It is found on the heat at up to BOX_SIDE pixels a side, far finer than any patch, and scaled back.
        """
        if not self.status:
            return None
        width, height = self.geometry.width, self.geometry.height
        step = max(1.0, max(width, height) / BOX_SIDE)
        size = (max(1, round(height / step)), max(1, round(width / step)))
        box = mapping.box(self.heat(size))
        if box is None:
            return None
        across, down = width / size[1], height / size[0]
        x0, y0, x1, y1 = (round(n * scale) for n, scale in zip(box, (across, down) * 2, strict=True))
        return x0, y0, x1, y1

    @property
    def range(self) -> tuple[float, float]:
        """Raw minimum and maximum over the seen patches."""
        values = self.raw[self.geometry.seen_cells]
        return (float(values.min()), float(values.max())) if values.size else (float("nan"), float("nan"))


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """The explanation of one image and one text: entries, maps per method, geometry, warnings and provenance.

    `methods` maps a method key to its maps. `target` is the kind of the explained scalar, `token_target` how parts of
    a given caption are scored (None for other texts), `provenance` everything needed to reproduce the result.
    A model may get an image in two views: in detail, mostly as tiles, and as a thumbnail. `geometry` is that of the
    detailed view, from which all maps, peaks and boxes are computed; `overview` that of the other, None if there is
    one view. Maps of different views are never averaged.
    `origin` is the origin of the caption: `given` (compared with the image), `generated` (by the model), `forced` (a
    given text, scored as if generated) or `predicted` (classes). `truncated` is True if a limit of the model on its
    input or output text cut the caption.
    """

    image: Picture
    caption: str
    entries: tuple[Entry, ...]
    methods: Mapping[str, MethodMaps]
    geometry: Geometry
    target: str
    token_target: str | None
    model: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "given"
    truncated: bool = False
    overview: Geometry | None = None

    @property
    def views(self) -> dict[str, Geometry]:
        """The geometry of each view of the image by name: `detail`, and `overview` if it has two views."""
        return {DETAIL: self.geometry} | ({} if self.overview is None else {OVERVIEW: self.overview})

    @property
    def separate(self) -> tuple[str, ...]:
        """Keys of the methods with a map of its own for each entry; an image as the only entry has all maps alone."""
        alone = all(entry.kind == "image" for entry in self.entries)
        return tuple(key for key, method in self.methods.items() if alone or not method.shared)

    @property
    def score(self) -> float | None:
        """The score of the entry of the caption or image, or of the only class; else None."""
        scores = [e.score for e in self.entries if e.kind in ("caption", "image", "class")]
        return scores[0] if scores and (len(scores) == 1 or self.entries[0].kind != "class") else None

    def index(self, which: int | str, occurrence: int = 0) -> int:
        """The index of an entry, by index or by label; without an exact match, case is ignored.

        Raises TextError listing the labels.
        """
        return find_label(which, [entry.label for entry in self.entries], occurrence)

    def map(self, which: int | str, method: str | None = None, occurrence: int = 0) -> PatchMap:
        """One entry's map by one method key (default: the first). Raises TextError, GroundingError."""
        key = next(iter(self.methods)) if method is None else method
        if key not in self.methods:
            raise GroundingError(f"no method {key!r} in this explanation (it has: {', '.join(self.methods)})")
        entry, chosen = self.index(which, occurrence), self.methods[key]
        index = chosen.index(entry)
        raw = chosen.maps[index]
        overview = None
        if chosen.overview is not None and self.overview is not None:
            small, status = chosen.overview[index], chosen.overview_status[index]
            overview = PatchMap(self.entries[entry], chosen, small, status, self.overview.of_map(*small.shape))
        geometry = self.geometry.of_map(*raw.shape)
        return PatchMap(self.entries[entry], chosen, raw, chosen.status[index], geometry, overview)

    def __getitem__(self, which: int | str) -> PatchMap:
        return self.map(which)

    def __iter__(self) -> Iterator[PatchMap]:
        return (self.map(i) for i in range(len(self.entries)))

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, label: object) -> bool:
        return any(str(label).lower() == entry.label.lower() for entry in self.entries)

    def __repr__(self) -> str:
        name = self.image.path or f"{self.image.width} x {self.image.height} image"
        return f"<Explanation of {name!r} and {self.caption!r}: {len(self)} entries by {', '.join(self.methods)}>"

    def figure(self, **options: Any) -> Figure:
        """Draw all maps side by side; `options` are those of `FigureOptions`. Raises OptionError."""
        return VIEWS["figure"](self, **options)

    def strip(self, **options: Any) -> Figure:
        """Draw the tokens of a generated text along its image; see `explanation.figures.reading_strip.strip`."""
        return VIEWS["strip"](self, **options)

    def show(self, **options: Any) -> None:
        """Show the figure in a notebook or a window; warn if there is neither."""
        import matplotlib as mpl
        from matplotlib import pyplot as plt

        figure = self.figure(**options)
        if "inline" in mpl.get_backend() or "nbagg" in mpl.get_backend():
            from IPython.display import display

            display(figure)
            return
        if mpl.get_backend().lower() not in mpl.backends.backend_registry.list_builtin(
            mpl.backends.BackendFilter.INTERACTIVE
        ):
            warnings.warn(
                f"no window to show the figure (matplotlib backend {mpl.get_backend()}): use save(directory)",
                stacklevel=2,
            )
            return
        canvas = plt.figure(figsize=figure.get_size_inches()).canvas
        canvas.figure = figure
        figure.set_canvas(canvas)
        plt.show()

    def save(
        self,
        directory: str | Path,
        write: Sequence[str] = ("png", "npz", "json"),
        *,
        per_token: bool = False,
        **options: Any,
    ) -> dict[str, Path]:
        """Write figure, maps and JSON into `directory`, atomically; return the files by kind.

        `write` selects among png, npz and json; `per_token` adds an overlay per entry and method. `options` are
        `inspections`, `channels` and those of `FigureOptions`; see `explanation.storage.save`.
        Raises OutputError, OptionError.
        """
        return VIEWS["save"](self, directory, write, per_token=per_token, **options)

    @staticmethod
    def load(directory: str | Path) -> Explanation:
        """Load a result saved with json and npz. Raises GroundingError for a folder without one."""
        return VIEWS["load"](directory)
