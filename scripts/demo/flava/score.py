"""Score an exported demo FLAVA on the shipped images of a split.

    python -m scripts.demo.flava.score [--split test] [--model data/demo/models/flava]

Pointing is strict: the centre of the highest patch must lie inside the box of the phrase. Scenes with at least three
entities, one bare phrase for each entity. Intervals: 95 %, bootstrap over images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import FlavaForPreTraining

from scripts.demo.clip.score import interval
from scripts.demo.clip.validate import ValidationSet, load_split
from scripts.demo.flava.validate import fusion_hits, fusion_scores, similarity_beats_swap, similarity_hits
from scripts.demo.paths import DATA, MODELS


def print_pointing(hits: dict[str, np.ndarray], data: ValidationSet) -> None:
    """Print one line for each map and group of phrases."""
    cases = data.cases
    groups = {"all": np.ones(len(cases), dtype=bool), "people": np.array([case.group == "people" for case in cases])}
    unseen = np.array([case.held_out for case in cases])
    if unseen.any():
        groups["held-out combinations"] = unseen
    images = np.array([case.image for case in cases])
    for name, found in hits.items():
        for group, chosen in groups.items():
            low, high = interval(found[chosen], images[chosen])
            share = f"{100 * found[chosen].mean():5.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            print(f"{name:26s} {group:22s} {share}  of {chosen.sum()} phrases", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("val", "test"), default="test", help="scenes to score on")
    parser.add_argument("--model", type=Path, default=MODELS / "flava", help="folder of the model")
    parser.add_argument("--limit", type=int, help="score only the first scenes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Load the checkpoint and print its scores."""
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    model = FlavaForPreTraining.from_pretrained(arguments.model, dtype=torch.float32).eval()
    data = load_split(arguments.split, DATA / "scenes/Images")
    if arguments.limit:
        data.scenes = data.scenes[: arguments.limit]
        data.cases = [case for case in data.cases if case.image < arguments.limit]
    print(f"{len(data.scenes)} images of the {arguments.split} split")
    print(f"similarity: true phrase beats a one-attribute swap: {similarity_beats_swap(model, data):.3f}")
    for name, value in fusion_scores(model, data).items():
        print(f"{name}: {value:.3f}", flush=True)
    print_pointing(similarity_hits(model, data) | fusion_hits(model, data), data)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
