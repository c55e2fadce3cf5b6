"""Figures from the maps that a batch run stored: the pictures are opened again, no model is needed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from grounding.batch.decode_pool import Opening
from grounding.batch.rows import Row, from_row
from grounding.batch.run_folder import RunFolder
from grounding.core.errors import GroundingError
from grounding.core.files import NAME_BYTES, slug, write_whole
from grounding.core.images import ImageError, Picture
from grounding.datasets.records import Dataset
from grounding.explanation.explanation import Explanation
from grounding.explanation.png import figure_png

FIGURES = "figures"


def explanations(
    run: RunFolder, dataset: Dataset, images: Collection[str] | None, told: Callable[[str], None]
) -> Iterator[tuple[str, Explanation]]:
    """(id, explanation) of every row that did not fail, of these pictures (None: all); `told` hears why one has none.

    Raises DataError for shards that are damaged.
    """
    opening = Opening(dataset.root, run.manifest["fingerprint"]["max_pixels"])
    for rows in run.images():
        if images is not None and rows[0]["image"] not in images:
            continue
        good = [row for row in rows if row["entries"] is not None]
        for row in rows:
            if row["entries"] is None:
                told(f"{row['id']}: {row['status']}: {row['error']}")
        if not good:
            continue
        try:
            image = _image(dataset, opening, good[0])
        except GroundingError as error:
            told(f"{rows[0]['image']}: {error}")
            continue
        shared = run.shared(rows)
        yield from ((row["id"], from_row(row, run.about, image, shared)) for row in good)


def _image(dataset: Dataset, opening: Opening, row: Row) -> Picture:
    """The picture that a row is about. Raises GroundingError where there is none, or another one."""
    found = opening(dataset.read(row["image"]).image)
    if isinstance(found, ImageError):
        raise found
    if found.sha256 != row["image_sha256"]:
        raise GroundingError("the picture has changed since its maps were made (sha256 differs)")
    return found


def draw(
    run: RunFolder,
    dataset: Dataset,
    images: Collection[str] | None,
    options: Mapping[str, Any],
    told: Callable[[str], None],
) -> Iterator[Path]:
    """Write figures/<id>.png in the run's folder for each row, and yield its path. Raises OptionError, OSError.

    What a file name cannot hold is replaced in it. Where that makes pictures of the run alike, whether they are drawn
    or not, signs of the id's sha256 tell them apart: no selection overwrites the figures of another.
    """
    folder = run.path / FIGURES
    folder.mkdir(exist_ok=True)
    alike = Counter(slug(image) for image in run.ids)
    for name, explanation in explanations(run, dataset, images, told):
        stem, image = slug(name, "picture"), name.rpartition("#")[0]
        if alike[slug(image)] > 1 or len(stem.encode()) > NAME_BYTES - 4:
            stem += f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        write_whole(folder / f"{stem}.png", figure_png(explanation, options))
        yield folder / f"{stem}.png"
