"""Character error rate of the demo TrOCR on lines outside its training distribution.

    python -m scripts.demo.trocr.robustness

Each kind has 200 lines in training faces, from a separate seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from transformers import VisionEncoderDecoderModel

from scripts.demo.lines.lines import Line, sample_line
from scripts.demo.paths import MODELS
from scripts.demo.trocr.score import character_errors, line_set, recognise, score

SEED = 505
COUNT = 200
UNCHANGED = "as in training"  # the only kind whose boxes remain valid, so maps are scored too


def sample_lines(longest: int = 16, shortest: int = 3) -> Iterator[Line]:
    """Lines of the full mixture whose texts have `shortest` to `longest` characters."""
    number = 0
    while True:
        line = sample_line(f"{SEED}/{number}", longest=longest)
        number += 1
        if len(line.text) >= shortest:
            yield line


def rotated(line: Line, degrees: float) -> Line:
    """The line, rotated about the centre of its image."""
    turned = line.image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=line.style.paper)
    return replace(line, image=turned)


def cropped(line: Line) -> Line:
    """The line, cropped to its characters; the aspect ratio is no longer about 8:1."""
    x0, y0, x1, y1 = line.boxes[0, 0], line.boxes[0, 1], line.boxes[-1, 2], line.boxes[-1, 3]
    room = 0.1 * (y1 - y0)
    box = (max(0, x0 - room), y0, min(line.image.width, x1 + room), y1)
    return replace(line, image=line.image.crop(tuple(round(value) for value in box)))


KINDS: dict[str, Callable[[], Iterator[Line]]] = {
    UNCHANGED: sample_lines,
    "turned by 1 degree": lambda: (rotated(line, 1) for line in sample_lines()),
    "turned by 2 degrees": lambda: (rotated(line, 2) for line in sample_lines()),
    "turned by 5 degrees": lambda: (rotated(line, 5) for line in sample_lines()),
    "17 to 20 characters": lambda: sample_lines(20, 17),
    "cut to the characters": lambda: (cropped(line) for line in sample_lines()),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODELS / "trocr", help="folder of the model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the character error rate of each kind."""
    arguments = build_parser().parse_args(argv)
    model = VisionEncoderDecoderModel.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="eager")
    for name, make in KINDS.items():
        data = line_set([line for _, line in zip(range(COUNT), make(), strict=False)])
        if name == UNCHANGED:
            print(name, json.dumps({key: round(value, 4) for key, value in score(model, data).rates(data).items()}))
        else:
            print(f"{name:22s} {character_errors(recognise(model, data.pixels), data.texts):.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
