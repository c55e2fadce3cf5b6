"""Score an exported demo CLIP on the shipped images of a split, and print where it points in the default image.

    python -m scripts.demo.clip.score [--split test] [--model data/demo/models/clip]

Pointing is strict: the centre of the highest patch must lie inside the box of the phrase. Scenes with at least three
entities, one bare phrase for each entity, score = cosine of image and phrase. Intervals: 95 %, bootstrap over images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPModel, PreTrainedTokenizerFast

from scripts.demo.clip.pointing import Case, baselines, is_hit, peak_point, phrase_maps, point_at
from scripts.demo.clip.tokenizer import build_tokenizer
from scripts.demo.clip.validate import ValidationSet, embed_images, embed_texts, load_split, retrieval, swap_accuracy
from scripts.demo.paths import DATA, MODELS
from scripts.demo.scenes.splits import DEFAULT_ID, split_scenes


def interval(hits: np.ndarray, images: np.ndarray, rounds: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over images; `images` holds the image index of each hit."""
    names, inverse = np.unique(images, return_inverse=True)
    sums, counts = np.bincount(inverse, hits), np.bincount(inverse)
    drawn = np.random.default_rng(0).integers(len(names), size=(rounds, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def print_pointing(model: CLIPModel, data: ValidationSet, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print one line for each map and group of phrases."""
    cases = data.cases
    groups = {"all": np.ones(len(cases), dtype=bool)}
    for name in ("people", "animals", "vehicles", "other"):
        groups[name] = np.array([case.group == name for case in cases])
    unseen = np.array([case.held_out for case in cases])
    if unseen.any():
        groups |= {"seen combinations": ~unseen, "held-out combinations": unseen}
    images = np.array([case.image for case in cases])
    results = point_at(model, data.pixels, cases, tokenizer) | baselines(cases)
    for map_name, hits in results.items():
        for group, chosen in groups.items():
            low, high = interval(hits[chosen], images[chosen])
            share = f"{100 * hits[chosen].mean():5.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            print(f"{map_name:10s} {group:22s} {share}  of {chosen.sum()} phrases")


def print_default(model: CLIPModel, data: ValidationSet, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print the peak of the maps of every phrase of the default image, in original pixels."""
    index = list(split_scenes("test")).index(DEFAULT_ID)
    cases: list[Case] = [case for case in data.cases if case.image == index]
    text = embed_texts(model, [case.phrase for case in cases], tokenizer)
    maps = phrase_maps(model, data.pixels[[index] * len(cases)], text)
    for map_name, grids in maps.items():
        for case, grid in zip(cases, grids.numpy(), strict=True):
            point = peak_point(grid, case.size)
            names = [other.phrase for other in cases if is_hit(point, other.boxes)]
            print(f"{map_name:10s} {case.phrase!r} -> ({point[0]:.0f}, {point[1]:.0f}) on {names or 'background'}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("val", "test"), default="test", help="scenes to score on")
    parser.add_argument("--model", type=Path, default=MODELS / "clip", help="folder of the model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Load the checkpoint and print its scores."""
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    model = CLIPModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = build_tokenizer()
    data = load_split(arguments.split, DATA / "scenes/Images")
    images = embed_images(model, data.pixels)
    if not images.isfinite().all():
        raise ValueError(f"the image embeddings of {arguments.model} are not finite")
    by_image, by_text = retrieval(model, data, images, tokenizer)
    print(f"{len(data.scenes)} images of the {arguments.split} split")
    print(f"recall at 1 of 32: image to caption {by_image:.3f}, caption to image {by_text:.3f}")
    print(f"true phrase beats a one-attribute swap: {swap_accuracy(model, data, images, tokenizer):.3f}")
    print_pointing(model, data, tokenizer)
    if arguments.split == "test":
        print_default(model, data, tokenizer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
