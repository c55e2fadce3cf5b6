"""Train the demo CLIP on rendered scenes and export it to data/demo/models.

    OMP_NUM_THREADS=1 python -m scripts.demo.clip.train

A stopped run resumes from its checkpoint. Training uses one thread; a worker process renders the scenes.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel

from scripts.demo.clip.batches import Batch, make_batch
from scripts.demo.clip.losses import LOSSES, LossScales, forward
from scripts.demo.clip.map_losses import MAP_LOSSES
from scripts.demo.clip.model import build_model, change_patch, export
from scripts.demo.clip.tokenizer import build_tokenizer
from scripts.demo.clip.validate import load_split, validate
from scripts.demo.paths import MODELS, RUNS
from scripts.demo.training import Stage, Training, adamw, prefetch


@dataclass(frozen=True, kw_only=True)
class ClipStage(Stage):
    """A stage with its patch size, and the name of the checkpoint that it exports."""

    patch: int
    folder: str
    batch: int = 48


PLAIN = {"contrast": 1.0, "phrase": 1.0, "box": 1.0}
MAPS = {**PLAIN, "phrase": 0.5, "gradcam": 1.0, "relevance": 0.75}
# Large patches first: they are cheap, and binding words to appearance needs many images; pointing then needs a fine
# grid. The last stage continues from the plain checkpoint, which stays as it is.
STAGES = (
    ClipStage(patch=14, steps=1600, lr=1.2e-3, lr_end=8e-4, weights=PLAIN, folder="clip-plain"),
    ClipStage(patch=8, steps=2300, lr=9e-4, lr_end=1e-5, weights=PLAIN, folder="clip-plain"),
    ClipStage(patch=8, steps=900, lr=6e-4, lr_end=1e-5, weights=MAPS, folder="clip", validate_every=300),
)


def build_trainable(patch: int) -> CLIPModel:
    """A new model in training mode with eager attention.

    In bfloat16 on a CPU, eager attention is a quarter to a half faster than the fused kernel at this size.
    """
    model = build_model(patch)
    model.set_attn_implementation("eager")
    return model.train()


class ClipTraining(Training):
    """Training of the CLIP; `models` is the folder of the exported checkpoints."""

    stage: ClipStage

    def __init__(self, stages: Sequence[ClipStage], models: Path) -> None:
        super().__init__(stages)
        self.models = models
        self.data = load_split("val")

    def build(self) -> None:
        """Create the model and the scales of its losses."""
        self.model, self.scales = build_trainable(self.stage.patch), LossScales()

    def modules(self) -> dict[str, nn.Module]:
        """The model and the scales of its losses."""
        return {"model": self.model, "scales": self.scales}

    def enter_stage(self) -> None:
        """Resize the patches if the stage needs it."""
        if self.stage.patch != self.model.config.vision_config.patch_size:
            resized = change_patch(self.model, self.stage.patch)
            self.model = build_trainable(self.stage.patch)
            self.model.load_state_dict(resized.state_dict())
        super().enter_stage()

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW."""
        return [adamw(self.model.parameters(), 0.05, self.scales.parameters())]

    def batches(self) -> Generator[Batch, None, None]:
        """Scenes with captions and queries."""
        make = partial(make_batch, size=self.stage.batch, tokenizer=build_tokenizer())
        return prefetch(make, self.steps_before + self.step)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses that the stage weighs."""
        with torch.autocast("cpu", torch.bfloat16):
            step = forward(self.model, self.scales, batch)
        return {name: (LOSSES | MAP_LOSSES)[name](step) for name in self.stage.weights}

    def validate(self) -> dict[str, float]:
        """Retrieval, one-attribute swaps and pointing on the validation scenes."""
        return validate(self.model, self.data)

    def export(self) -> None:
        """Write the checkpoint of the stage."""
        export(self.model, self.models / self.stage.folder)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=RUNS / "clip.pt", help="file to save to and resume from")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for the checkpoints clip-plain and clip")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train all remaining stages and export the model."""
    arguments = build_parser().parse_args(argv)
    ClipTraining(STAGES, arguments.models).run(arguments.checkpoint)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
