"""Draw figures from the stored maps of a batch run: images are opened again, no model is loaded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from grounding.batch.decode_pool import ImageOpener
from grounding.batch.rows import Row, from_row
from grounding.batch.run_folder import RunFolder
from grounding.core.errors import GroundingError, ImageError
from grounding.core.files import NAME_BYTES, slug, write_whole
from grounding.core.images import Picture
from grounding.datasets.records import Dataset
from grounding.explanation.explanation import Explanation
from grounding.explanation.png import figure_png

FIGURES = "figures"


def explanations(
    run: RunFolder, dataset: Dataset, images: Collection[str] | None, on_skip: Callable[[str], None]
) -> Iterator[tuple[str, Explanation]]:
    """Yield (row id, explanation) for every row that did not fail, of these images (None: all images).

    `on_skip` is called with a one-line reason for every row or image without an explanation. Raises DataError for
    damaged shards.
    """
    opener = ImageOpener(dataset.root, run.manifest["fingerprint"]["max_pixels"])
    for rows in run.images():
        if images is not None and rows[0]["image"] not in images:
            continue
        good = [row for row in rows if row["entries"] is not None]
        for row in rows:
            if row["entries"] is None:
                on_skip(f"{row['id']}: {row['status']}: {row['error']}")
        if not good:
            continue
        try:
            image = _image(dataset, opener, good[0])
        except GroundingError as error:
            on_skip(f"{rows[0]['image']}: {error}")
            continue
        shared = run.shared(rows)
        yield from ((row["id"], from_row(row, run.metadata, image, shared)) for row in good)


def _image(dataset: Dataset, opener: ImageOpener, row: Row) -> Picture:
    """Open the image of a row. Raises GroundingError if it cannot be opened or has changed."""
    found = opener(dataset.read(row["image"]).image)
    if isinstance(found, ImageError):
        raise found
    if found.sha256 != row["image_sha256"]:
        raise GroundingError("the image has changed since its maps were computed (sha256 differs)")
    return found


def draw(
    run: RunFolder,
    dataset: Dataset,
    images: Collection[str] | None,
    options: Mapping[str, Any],
    on_skip: Callable[[str], None],
) -> Iterator[Path]:
    """Write figures/<id>.png in the run's folder for each row, and yield its path. Raises OptionError, OSError.

    Characters that file names cannot hold are replaced. If that makes the names of two images of the run equal, drawn
    or not, part of the id's sha256 is appended: figures of one selection never overwrite those of another.
    """
    folder = run.path / FIGURES
    folder.mkdir(exist_ok=True)
    alike = Counter(slug(image) for image in run.ids)
    for name, explanation in explanations(run, dataset, images, on_skip):
        stem, image = slug(name, "picture"), name.rpartition("#")[0]
        if alike[slug(image)] > 1 or len(stem.encode()) > NAME_BYTES - 4:
            stem += f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        write_whole(folder / f"{stem}.png", figure_png(explanation, options))
        yield folder / f"{stem}.png"
