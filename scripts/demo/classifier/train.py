"""Train the demo classifier on single objects of the demo world and export it to data/demo/models/classifier.

    OMP_NUM_THREADS=1 python -m scripts.demo.classifier.train

A stopped run resumes from its checkpoint. Training takes about ten minutes on one thread and uses neither boxes nor
maps.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from scripts.demo.classifier.pictures import SHIPPED_SEED, Labelled, held_out, single, training_batch
from scripts.demo.clip.batches import MEAN, STD
from scripts.demo.clip.tokenizer import build_processor
from scripts.demo.paths import MODELS, RUNS
from scripts.demo.scenes.make_scenes import JPEG
from scripts.demo.scenes.vocabulary import KINDS
from scripts.demo.scenes.world import render
from scripts.demo.training import Stage, Training, replaced, set_json_value

DECAY = 0.02
SHIPPED_SIDE = 224


class ClassifierStage(Stage):
    """A stage whose learning rate falls to `lr_end` from the sum of `lr` and `lr_end`."""

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine, above `lr_end`."""
        warm = min(1.0, (step + 1) / self.warmup)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps)) + self.lr_end


STAGES = (
    ClassifierStage(steps=600, batch=48, lr=3e-3, lr_end=1e-6, weights={"loss": 1.0}, warmup=60, validate_every=100),
)


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
            # The toolkit shows the advice for images that are not below these paths of the demo folder.
            demo_world={
                "images": ["classes"],
                "advice": "this model is trained on single objects of a cartoon world alone, maps of other images are "
                "meaningless: use --model microsoft/resnet-34",
            },
        )
    )


def normalised(images: Labelled) -> torch.Tensor:
    """(B, 3, 112, 112) float32, normalised as by the image processor."""
    return (images.pixels.float() / 255 - MEAN) / STD


@torch.no_grad()
def accuracy(model: ResNetForImageClassification, images: Labelled) -> dict[str, float]:
    """Accuracy, overall and by class."""
    model.eval()
    parts = [model(part).logits.argmax(-1) for part in normalised(images).split(100)]
    correct = (torch.cat(parts) == images.classes).float()
    model.train()
    by_class = {kind: correct[images.classes == i].mean().item() for i, kind in enumerate(KINDS)}
    return {"all": correct.mean().item(), **by_class}


def export(model: ResNetForImageClassification, folder: Path) -> None:
    """Write model (fp16) and image processor."""
    half = build_model()
    half.load_state_dict(model.state_dict())
    with replaced(folder) as fresh:
        half.half().save_pretrained(fresh)
        build_processor().image_processor.save_pretrained(fresh)
        # A class name that exists in transformers with all image back ends.
        set_json_value(fresh / "preprocessor_config.json", "image_processor_type", "CLIPImageProcessor")


def write_images(folder: Path) -> None:
    """Write one held-out image of each class, as examples for users."""
    rng = random.Random(SHIPPED_SEED)
    with replaced(folder) as fresh:
        for kind in KINDS:
            render(single(kind, rng), SHIPPED_SIDE)[0].save(fresh / f"{kind}.jpg", **JPEG)


class ClassifierTraining(Training):
    """Training of the classifier; `folder` is the folder of the exported checkpoint."""

    def __init__(self, stages: Sequence[ClassifierStage], folder: Path) -> None:
        super().__init__(stages)
        self.folder = folder
        self.data = held_out()

    def build(self) -> None:
        """Create the model."""
        self.model = build_model().train()

    def modules(self) -> dict[str, nn.Module]:
        """The model."""
        return {"model": self.model}

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW with weight decay on all parameters."""
        return [torch.optim.AdamW(self.model.parameters(), self.stage.lr, weight_decay=DECAY)]

    def clipped_parameters(self) -> Iterable[nn.Parameter]:
        """None: gradients are not clipped."""
        return ()

    def batches(self) -> Generator[Labelled, None, None]:
        """Images of single objects, rendered in this process; the renderer mirrors half of them."""
        for number in itertools.count(self.step):
            yield training_batch(number, self.stage.batch)

    def losses(self, batch: Labelled) -> dict[str, torch.Tensor]:
        """Cross-entropy with label smoothing."""
        logits = self.model(normalised(batch)).logits
        return {"loss": functional.cross_entropy(logits, batch.classes, label_smoothing=0.05)}

    def validate(self) -> dict[str, float]:
        """Accuracy on the held-out images."""
        return accuracy(self.model, self.data)

    def export(self) -> None:
        """Write the checkpoint."""
        export(self.model, self.folder)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    checkpoint = RUNS / "classifier/run.pt"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=checkpoint, help="file to save to and resume from")
    parser.add_argument("--folder", type=Path, default=MODELS / "classifier", help="folder for the exported model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train the remaining steps, export the model, and write one image of each class."""
    arguments = build_parser().parse_args(argv)
    ClassifierTraining(STAGES, arguments.folder).run(arguments.checkpoint)
    write_images(arguments.folder.parents[1] / "classes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
