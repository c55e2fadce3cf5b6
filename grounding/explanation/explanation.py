"""The result: frozen, holding raw signed patch maps; everything in original pixels is derived on demand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from grounding.core.errors import GroundingError
from grounding.core.geometry import Geometry
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
    """What is explained: a caption, token, word or phrase (characters [start, end) of the caption), a class, an image.

    `score` is the explained scalar; `token_id` is that of a token, or of a word of one token. A token that a model
    wrote (or was made to write) has the `probability` it had at its place and the next best `alternatives`; so has a
    class, whose index is `token_id`: those of the five most probable that are others. Kinds
    `where` and `contrast` ask about tokens that were not written: evidence for the token `token_id` at the place of
    characters [start, end), or for it rather than for another.
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
    """One method at one layer: raw maps (entries, rows, columns), or (1, rows, columns) where all entries share one.

    `text_conditioned` is False where the method cannot see the text; `status` has one item per stored map.
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

    def __repr__(self) -> str:
        return f"<MapColumn {self.key}: {len(self.maps)} maps of {self.maps.shape[1]} x {self.maps.shape[2]} patches>"

    @property
    def shared(self) -> bool:
        """Whether one map stands for all entries."""
        return not self.text_conditioned

    def index(self, entry: int) -> int:
        """The place of an entry's map in `maps` and `status`."""
        return 0 if self.shared else entry


@dataclass(frozen=True, eq=False, repr=False)
class PatchMap:
    """One map of an explanation: `explanation["jacket"]`, or `explanation.map("jacket", "relevance")`."""

    entry: Entry
    method: MethodMaps
    raw: Float[np.ndarray, "rows columns"]
    status: Status
    geometry: Geometry

    def __repr__(self) -> str:
        return f"<EntryMap {self.entry.label!r} by {self.method.key}: peak {self.peak}, {self.status.status}>"

    @property
    def view(self) -> Float[np.ndarray, "rows columns"]:
        """The part that speaks for the entry, on the patch grid: >= 0."""
        threshold = self.method.options.get(THRESHOLD, 0.0)
        return mapping.view(self.raw, signed=self.method.signed, threshold=threshold)

    def heat(self, size: tuple[int, int] | None = None) -> Float[np.ndarray, "height width"]:
        """The view in original pixels (or at `size` = (height, width) of the same field of view), NaN where unseen."""
        return self.geometry.to_original(self.view, size=size)

    @property
    def peak(self) -> tuple[float, float] | None:
        """Centre of the strongest seen patch, (x, y) in original pixels; None for a degenerate map."""
        return mapping.peak(self.raw, self.geometry) if self.status else None

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """Largest region above half of the range: (x0, y0, x1, y1) in original pixels; None for a degenerate map.

        Found on the heat at up to BOX_SIDE pixels a side, far finer than any patch, and scaled back.
        """
        if not self.status:
            return None
        width, height = self.geometry.width, self.geometry.height
        step = max(1.0, max(width, height) / BOX_SIDE)
        size = (max(1, round(height / step)), max(1, round(width / step)))
        found = mapping.box(self.heat(size))
        if found is None:
            return None
        across, down = width / size[1], height / size[0]
        x0, y0, x1, y1 = (round(n * scale) for n, scale in zip(found, (across, down) * 2, strict=True))
        return x0, y0, x1, y1

    @property
    def range(self) -> tuple[float, float]:
        """Raw minimum and maximum over the seen patches."""
        values = self.raw[self.geometry.seen_cells]
        return (float(values.min()), float(values.max())) if values.size else (float("nan"), float("nan"))


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What one picture and one text give: entries, maps per method, geometry, warnings and provenance.

    `columns` maps a method's key to its maps. `target` is the kind of scalar explained, `token_target` how a part of
    the caption was scored (None: by itself), `provenance` everything needed to make it again. `origin` says where the
    caption is from: `given` (a text the model compares), `generated` (what the model wrote) or `forced` (what it was
    made to write), `truncated` that it was cut: by a limit of the model's on what it reads, or on what it writes.
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

    @property
    def score(self) -> float | None:
        """The score of the caption's own entry, or of the class where there is one alone; else None."""
        found = [e.score for e in self.entries if e.kind in ("caption", "image", "class")]
        return found[0] if found and (len(found) == 1 or self.entries[0].kind != "class") else None

    def index(self, which: int | str, occurrence: int = 0) -> int:
        """The place of an entry, by index or by label: as it is written, or else with case ignored.

        Raises TextError listing what there is.
        """
        return find_label(which, [entry.label for entry in self.entries], occurrence)

    def map(self, which: int | str, column: str | None = None, occurrence: int = 0) -> PatchMap:
        """One entry's map by one method (default: the first). Raises TextError, GroundingError."""
        key = next(iter(self.methods)) if column is None else column
        if key not in self.methods:
            raise GroundingError(f"no method {key!r} in this explanation (it has: {', '.join(self.methods)})")
        entry, chosen = self.index(which, occurrence), self.methods[key]
        place = chosen.index(entry)
        raw = chosen.maps[place]
        return PatchMap(self.entries[entry], chosen, raw, chosen.status[place], self.geometry.of_map(*raw.shape))

    def __getitem__(self, which: int | str) -> PatchMap:
        return self.map(which)

    def __iter__(self) -> Iterator[PatchMap]:
        return (self.map(i) for i in range(len(self.entries)))

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, label: object) -> bool:
        return any(str(label).lower() == entry.label.lower() for entry in self.entries)

    def __repr__(self) -> str:
        name = self.image.path or f"{self.image.width} x {self.image.height} picture"
        return f"<Explanation of {name!r} and {self.caption!r}: {len(self)} entries by {', '.join(self.methods)}>"

    def figure(self, **options: Any) -> Figure:
        """The side-by-side figure; options as in `grounding.render.figure`."""
        return VIEWS["figure"](self, **options)

    def strip(self, **options: Any) -> Figure:
        """The tokens along the picture of a text, each at its peak; options as in `grounding.strip.strip`."""
        return VIEWS["strip"](self, **options)

    def show(self, **options: Any) -> None:
        """Show the figure in a notebook, or in a window; a warning where there is neither."""
        import matplotlib as mpl
        from matplotlib import pyplot as plt

        made = self.figure(**options)
        if "inline" in mpl.get_backend() or "nbagg" in mpl.get_backend():
            from IPython.display import display

            display(made)
            return
        if mpl.get_backend().lower() not in mpl.backends.backend_registry.list_builtin(
            mpl.backends.BackendFilter.INTERACTIVE
        ):
            warnings.warn(
                f"no window to show the figure in (matplotlib backend {mpl.get_backend()}): use save(directory)",
                stacklevel=2,
            )
            return
        canvas = plt.figure(figsize=made.get_size_inches()).canvas
        canvas.figure = made
        made.set_canvas(canvas)
        plt.show()

    def save(
        self,
        directory: str | Path,
        write: Sequence[str] = ("png", "npz", "json"),
        *,
        per_token: bool = False,
        **options: Any,
    ) -> dict[str, Path]:
        """Write figure, maps and JSON into `directory`, whole or not at all; returns what was written, by kind.

        `write` chooses among png, npz, json; `per_token` adds an overlay per entry and method, `inspections` a figure
        of what is inside; `options` go to the figure. See `grounding.export.save`. Raises OSError.
        """
        return VIEWS["save"](self, directory, write, per_token=per_token, **options)

    @staticmethod
    def load(directory: str | Path) -> Explanation:
        """The inverse of `save` with json and npz. Raises GroundingError for a folder that is none of ours."""
        return VIEWS["load"](directory)
