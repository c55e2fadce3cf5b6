"""Train the demo classifier on single objects of the demo world and export it to data/demo/models/classifier.

    OMP_NUM_THREADS=1 python -m scripts.demo.classifier.train

Resumes by itself from runs/demo/classifier/run.pt. One thread; about ten minutes. No box and no map is ever seen.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from scripts.demo.classifier.pictures import SHIPPED_SEED, Labelled, held_out, single, training_batch
from scripts.demo.clip.batches import MEAN, STD
from scripts.demo.clip.tokenizer import build_processor
from scripts.demo.scenes.make_scenes import JPEG
from scripts.demo.scenes.vocabulary import KINDS
from scripts.demo.scenes.world import render
from scripts.demo.training import replaced

ROOT = Path(__file__).resolve().parents[3]
SEED, STEPS, BATCH, WARMUP = 0, 600, 48, 60
LEARNING_RATE, DECAY = 3e-3, 0.02
SAVE_EVERY, SHIPPED_SIDE = 100, 224


@dataclass
class Run:
    """The state of training: what a checkpoint holds."""

    model: ResNetForImageClassification
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint; a reader never sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": self.step, "seconds": self.seconds}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def build_model() -> ResNetForImageClassification:
    """A ResNet of three stages of two blocks: 112 pixels become 7 x 7 cells of width 128."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[2, 2, 2],
            layer_type="basic",
            id2label=dict(enumerate(KINDS)),
            label2id={kind: index for index, kind in enumerate(KINDS)},
            demo_world=True,  # read by the toolkit: warns where a picture is not from the demo world
        )
    )


def load_run(path: Path) -> Run:
    """The run as `Run.save` wrote it, or one before its first step."""
    torch.manual_seed(SEED)
    model = build_model().train()
    run = Run(model, torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=DECAY))
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step, run.seconds = state["step"], state["seconds"]
    return run


def normalised(pictures: Labelled) -> torch.Tensor:
    """(B, 3, 112, 112) as the image processor makes them."""
    return (pictures.pixels.float() / 255 - MEAN) / STD


def train_step(run: Run) -> float:
    """One optimizer step; its loss. Half of the pictures are mirrored by the renderer, that is all the variety."""
    warm = min(1.0, (run.step + 1) / WARMUP)
    run.optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * run.step / STEPS)) + 1e-6
    batch = training_batch(run.step, BATCH)
    loss = functional.cross_entropy(run.model(normalised(batch)).logits, batch.classes, label_smoothing=0.05)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    run.optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model: ResNetForImageClassification, pictures: Labelled) -> dict[str, float]:
    """The share of pictures whose class is the most probable one, overall and by class."""
    model.eval()
    parts = [model(part).logits.argmax(-1) for part in normalised(pictures).split(100)]
    right = (torch.cat(parts) == pictures.classes).float()
    model.train()
    by_class = {kind: right[pictures.classes == i].mean().item() for i, kind in enumerate(KINDS)}
    return {"all": right.mean().item(), **by_class}


def export(model: ResNetForImageClassification, folder: Path) -> None:
    """Write model (fp16) and image processor."""
    half = build_model()
    half.load_state_dict(model.state_dict())
    with replaced(folder) as fresh:
        half.half().save_pretrained(fresh)
        build_processor().image_processor.save_pretrained(fresh)
        file = fresh / "preprocessor_config.json"
        # The class name that releases of transformers with other back ends know, too.
        settings = json.loads(file.read_text()) | {"image_processor_type": "CLIPImageProcessor"}
        file.write_text(json.dumps(settings, indent=2) + "\n")


def write_pictures(folder: Path) -> None:
    """One held-out picture of every class, to try the classifier on."""
    rng = random.Random(SHIPPED_SEED)
    with replaced(folder) as fresh:
        for kind in KINDS:
            render(single(kind, rng), SHIPPED_SIDE)[0].save(fresh / f"{kind}.jpg", **JPEG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps that are left, report on the held-out pictures, export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "runs/demo/classifier/run.pt")
    parser.add_argument("--folder", type=Path, default=ROOT / "data/demo/models/classifier")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    run, data = load_run(arguments.checkpoint), held_out()
    while run.step < STEPS:
        begin = time.monotonic()
        loss = train_step(run)
        run.step, run.seconds = run.step + 1, run.seconds + time.monotonic() - begin
        if run.step % SAVE_EVERY == 0:
            figures = {name: round(value, 3) for name, value in accuracy(run.model, data).items()}
            print(f"step {run.step} minutes {run.seconds / 60:.1f} loss {loss:.3f}", json.dumps(figures), flush=True)
            run.save(arguments.checkpoint)
    export(run.model, arguments.folder)
    write_pictures(arguments.folder.parents[1] / "classes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
