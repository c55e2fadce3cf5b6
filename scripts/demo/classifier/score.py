"""Score the demo classifier on 600 held-out images: accuracy, and share of map peaks in the object's box.

python -m scripts.demo.classifier.score
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters import load
from grounding import explain
from scripts.demo.classifier.pictures import held_out
from scripts.demo.paths import MODELS
from scripts.demo.scenes.vocabulary import KINDS

METHODS = ("gradcam", "gradcam_ln", "hirescam", "layercam", "gradcam_pp")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=MODELS / "classifier", help="folder of the model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores as JSON."""
    arguments = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    adapter, data = load(str(arguments.folder), device="cpu"), held_out()
    images = [image.permute(1, 2, 0).contiguous().numpy() for image in data.pixels]
    found = explain(adapter, images, data.classes.tolist(), methods=METHODS, batch_size=50)
    right, hits = 0, dict.fromkeys(METHODS, 0)
    for one, box in zip(found, data.boxes.tolist(), strict=True):
        entry = one.entries[0]
        right += all(entry.probability > other.probability for other in entry.alternatives)
        for method in METHODS:
            peak = one.map(0, method).peak
            hits[method] += peak is not None and box[0] <= peak[0] < box[2] and box[1] <= peak[1] < box[3]
    count = len(found)
    scores = {"images": count, "classes": len(KINDS), "accuracy": round(right / count, 4)}
    print(json.dumps(scores | {f"pointing {name}": round(n / count, 4) for name, n in hits.items()}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
