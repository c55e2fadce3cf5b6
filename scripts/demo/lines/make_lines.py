"""Render the validation and test lines into data/demo/lines, and the default line.

    python -m scripts.demo.lines.make_lines

The seeds are fixed; the same versions of Pillow, numpy and matplotlib (the source of the fonts) write the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from scripts.demo.lines.lines import INPUT_HEIGHT, UNSEEN_FACES, Line, Style, render, sample_line
from scripts.demo.paths import DATA

SEEDS = {"val": 303, "test": 404}
COUNTS = {"val": (100, 20), "test": (340, 60)}  # lines in training faces, and in unseen faces
ROW = 16  # height of a patch in the model's input
QUALITY = 80  # JPEG quality where the style sets none


def is_scorable(line: Line) -> bool:
    """Whether every row of patches that the line covers by more than a third also has its centre in the line.

    Otherwise a peak in that row would be on the line, but its centre would count as a miss.
    """
    top, bottom = line.boxes[0, [1, 3]] * INPUT_HEIGHT / line.image.height
    for row in range(0, INPUT_HEIGHT, ROW):
        held = min(bottom, row + ROW) - max(top, row)
        if held > ROW / 3 and not top <= row + ROW / 2 < bottom:
            return False
    return True


def _first(split: str, count: int, part: str, faces: tuple[str, ...]) -> Iterator[Line]:
    """The first `count` scorable lines of a part of a split."""
    drawn = (sample_line(f"{SEEDS[split]}/{part}/{number}", faces=faces) for number in itertools.count())
    return itertools.islice(filter(is_scorable, drawn), count)


def split_lines(split: str) -> list[Line]:
    """The lines of a split: first those in training faces, then those in unseen faces."""
    seen, unseen = COUNTS[split]
    return [*_first(split, seen, "seen", ()), *_first(split, unseen, "unseen", UNSEEN_FACES)]


def default_line() -> Line:
    """The default line: dark on light, a training face, no noise."""
    style = Style("DejaVuSerif", 20.0, 0.45, 0.35, 64, 0.9, (38, 38, 64), (250, 246, 232))
    return render("Total $12.50", style, np.random.default_rng(0))


def _json(line: Line, file: str) -> str:
    return json.dumps({"file": file, **line.label()}) + "\n"


def write_split(folder: Path, split: str) -> int:
    """Write images and labels.jsonl of a split to `folder`; return the number of lines."""
    folder.mkdir(parents=True)
    lines = split_lines(split)
    labels = ""
    for number, line in enumerate(lines):
        file = f"{number:03d}.jpg"
        line.image.save(folder / file, quality=line.style.jpeg or QUALITY, optimize=True)
        labels += _json(line, file)
    (folder / "labels.jsonl").write_text(labels, encoding="utf-8")
    return len(lines)


def write_lines(folder: Path) -> int:
    """Write all splits to `folder`, which is replaced as a whole; return the number of lines."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    count = sum(write_split(fresh / split, split) for split in SEEDS)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)
    return count


def write_default(folder: Path) -> None:
    """Write the default line and its label."""
    line = default_line()
    line.image.save(folder / "line.png", optimize=True)
    (folder / "line.json").write_text(_json(line, "line.png"), encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA / "lines", help="folder to write; line.png goes beside it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the lines and the default line."""
    arguments = build_parser().parse_args(argv)
    count = write_lines(arguments.out)
    write_default(arguments.out.parent)
    print(f"{count} lines in {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
