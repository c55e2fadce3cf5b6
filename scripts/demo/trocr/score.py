"""Score the demo TrOCR: character error rate, and share of map peaks in the box of the character.

    python -m scripts.demo.trocr.score [--split test]

The maps are computed in this file, independently of the toolkit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import VisionEncoderDecoderModel, ViTImageProcessor

from scripts.demo.lines.lines import INPUT_HEIGHT, INPUT_WIDTH, Line, resize_to_input
from scripts.demo.paths import DATA, MODELS
from scripts.demo.trocr.model import EOS, MAX_TOKENS, build_tokenizer, grid, patch_of

LINES = DATA / "lines"
CHUNK = 50


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, 32, 256) float32 from uint8, as the image processor scales."""
    return images.float() / 127.5 - 1


@dataclass(frozen=True)
class LineSet:
    """Preprocessed lines; boxes in pixels of the model's input."""

    texts: list[str]
    labels: list[dict[str, Any]]
    pixels: torch.Tensor  # (N, 3, 32, 256)
    ids: torch.Tensor  # (N, T) bos, characters, eos, padding
    boxes: list[np.ndarray]


def line_set(lines: Sequence[Line]) -> LineSet:
    """Preprocess rendered lines."""
    pixels = pixel_values(
        torch.from_numpy(np.stack([resize_to_input(line.image) for line in lines])).permute(0, 3, 1, 2)
    )
    boxes = [_boxes_in_input(line.boxes, line.image.size) for line in lines]
    return _tokenised([line.label() for line in lines], pixels, boxes)


def load_split(split: str, processor: ViTImageProcessor) -> LineSet:
    """Load the shipped lines of a split and preprocess them with the image processor."""
    folder = LINES / split
    labels = [json.loads(line) for line in (folder / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    images = [Image.open(folder / label["file"]).convert("RGB") for label in labels]
    boxes = [_boxes_in_input(np.array(label["chars"]), p.size) for label, p in zip(labels, images, strict=True)]
    return _tokenised(labels, processor(images, return_tensors="pt")["pixel_values"], boxes)


def _tokenised(labels: list[dict[str, Any]], pixels: torch.Tensor, boxes: list[np.ndarray]) -> LineSet:
    texts = [str(label["text"]) for label in labels]
    ids = build_tokenizer()(texts, padding=True, return_tensors="pt")["input_ids"]
    return LineSet(texts, labels, pixels, ids, boxes)


def _boxes_in_input(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Convert boxes from pixels of an image of `size` (width, height) to pixels of the model's input."""
    x, y = INPUT_WIDTH / size[0], INPUT_HEIGHT / size[1]
    return boxes * [x, y, x, y]


def edit_distance(one: str, two: str) -> int:
    """Levenshtein distance between two texts."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


@torch.no_grad()
def recognise(model: VisionEncoderDecoderModel, pixels: torch.Tensor) -> list[str]:
    """Generate the texts of lines by greedy decoding."""
    texts: list[str] = []
    for chunk in pixels.split(CHUNK):
        texts += build_tokenizer().batch_decode(
            model.generate(chunk, do_sample=False, num_beams=1, max_length=MAX_TOKENS), skip_special_tokens=True
        )
    return texts


def character_errors(texts: Sequence[str], truths: Sequence[str]) -> float:
    """Character error rate: edit distance over the number of true characters."""
    return sum(map(edit_distance, texts, truths)) / sum(map(len, truths))


def cross_maps(model: VisionEncoderDecoderModel, data: LineSet) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Cross-attention and gradient x cross-attention (N, T, rows, columns) of the last layer, and accuracy.

    Teacher forcing with the true text; row t belongs to its t-th character. The column of the class token is dropped.
    """
    plain, weighted, right = [], [], []
    for pixels, ids in zip(data.pixels.split(CHUNK), data.ids.split(CHUNK), strict=True):
        out = model(pixels, decoder_input_ids=ids[:, :-1], output_attentions=True)
        attention = out.cross_attentions[-1]  # (B, heads, T, 1 + patches)
        # Row t of the last cross-attention affects only the logits of step t, so one backward pass is enough.
        chosen = out.logits.gather(-1, ids[:, 1:, None]).sum()
        gradient = torch.autograd.grad(chosen, attention)[0]
        maps = attention[..., 1:].unflatten(-1, grid(patch_of(model)))
        slope = gradient[..., 1:].unflatten(-1, grid(patch_of(model)))
        plain.append(maps.mean(1).detach())
        weighted.append((maps * slope).relu().mean(1).detach())
        visible = ids[:, 1:] > EOS
        right.append((out.logits.argmax(-1) == ids[:, 1:])[visible])
    return torch.cat(plain), torch.cat(weighted), torch.cat(right).float().mean().item()


def own_box(maps: torch.Tensor, boxes: Sequence[np.ndarray]) -> list[list[bool]]:
    """For each line and character, whether the centre of the highest patch lies in the character's box."""
    rows, columns = maps.shape[-2:]
    hits = []
    for of_line, line_boxes in zip(maps, boxes, strict=True):
        peaks = of_line[: len(line_boxes)].flatten(1).argmax(1).numpy()
        y, x = (peaks // columns + 0.5) * INPUT_HEIGHT / rows, (peaks % columns + 0.5) * INPUT_WIDTH / columns
        inside = (line_boxes[:, 0] <= x) & (x < line_boxes[:, 2]) & (line_boxes[:, 1] <= y) & (y < line_boxes[:, 3])
        hits.append(inside.tolist())
    return hits


def _share(hits: Sequence[Sequence[bool]], texts: Sequence[str], spaces: bool = True) -> float:
    """Share of hits among all characters, or among all but spaces."""
    pairs = zip(hits, texts, strict=True)
    flat = [hit for line, text in pairs for hit, c in zip(line, text, strict=True) if spaces or c != " "]
    return sum(flat) / max(1, len(flat))


@dataclass(frozen=True)
class Scores:
    """Generated texts and hits of the map peaks, by line."""

    recognised: list[str]
    attention: list[list[bool]]
    gradient: list[list[bool]]
    accuracy: float  # share of correct characters under teacher forcing

    def rates(self, data: LineSet, rows: Sequence[int] | None = None) -> dict[str, float]:
        """Character error rate, and shares of peaks in the character's box, of all or some lines; `_ink`: no spaces."""
        rows = range(len(self.recognised)) if rows is None else rows
        texts = [data.texts[row] for row in rows]
        rates = {"cer": character_errors([self.recognised[row] for row in rows], texts)}
        for name, hits in (("attention", self.attention), ("gradient", self.gradient)):
            chosen = [hits[row] for row in rows]
            rates[name] = _share(chosen, texts)
            rates[f"{name}_ink"] = _share(chosen, texts, spaces=False)
        return rates


def score(model: VisionEncoderDecoderModel, data: LineSet) -> Scores:
    """Generate the texts of the lines, and score both maps of every character."""
    training = model.training
    model.eval()
    plain, weighted, accuracy = cross_maps(model, data)
    scores = Scores(recognise(model, data.pixels), own_box(plain, data.boxes), own_box(weighted, data.boxes), accuracy)
    model.train(training)
    return scores


def _height(label: dict[str, Any], side: int) -> float:
    """Upper (`side` 1) or lower (3) edge of the line box, in pixels of the input."""
    return label["chars"][0][side] * INPUT_HEIGHT / label["height"]


# Groups of lines with separate scores; in the last, the centre of only one of the two rows of patches is in the line.
GROUPS = {
    "all": lambda _: True,
    "seen faces": lambda label: not label["unseen_face"],
    "unseen faces": lambda label: label["unseen_face"],
    "dark on light": lambda label: label["polarity"] == "dark",
    "light on dark": lambda label: label["polarity"] == "light",
    "coloured": lambda label: len(set(label["ink"]) | set(label["paper"])) > 2,
    "noise or blur": lambda label: label["noise"] > 0 or label["blur"] > 0,
    "upper or lower half": lambda label: _height(label, 1) >= 8 or _height(label, 3) <= 24,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("val", "test"), default="test", help="lines to score on")
    parser.add_argument("--model", type=Path, default=MODELS / "trocr", help="folder of the model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores of a split for each group of lines."""
    arguments = build_parser().parse_args(argv)
    model = VisionEncoderDecoderModel.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="eager")
    data = load_split(arguments.split, ViTImageProcessor.from_pretrained(arguments.model))
    scores = score(model, data)
    for name, belongs in GROUPS.items():
        rows = [row for row, label in enumerate(data.labels) if belongs(label)]
        shown = {key: round(value, 4) for key, value in scores.rates(data, rows).items()}
        print(f"{name:20s} {len(rows):4d} lines", json.dumps(shown))
    for row, (text, truth) in enumerate(zip(scores.recognised, data.texts, strict=True)):
        if text != truth:
            print(f"{row:4d} {truth!r} recognised as {text!r} ({data.labels[row]['face']})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
