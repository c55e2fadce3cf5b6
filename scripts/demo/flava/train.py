"""Train the demo FLAVA, starting from the demo CLIP, and export it to data/demo/models/flava.

    OMP_NUM_THREADS=1 python -m scripts.demo.flava.train

A stopped run resumes from its checkpoint. Training uses one thread; a worker process renders the scenes.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel

from scripts.demo.clip.validate import load_split
from scripts.demo.flava.batches import TRAIN_SEED, ImageBatch, make_images, text_without_image
from scripts.demo.flava.losses import FUSION_LOSSES, WordPatchHead, fused_step, image_states, text_states
from scripts.demo.flava.model import build_model, export, start_from_clip
from scripts.demo.flava.rows import make_rows
from scripts.demo.flava.start import start_fusion
from scripts.demo.flava.text import PAD, padded
from scripts.demo.flava.towers import Losses, image_losses, text_losses
from scripts.demo.flava.validate import validate_fusion, validate_towers
from scripts.demo.paths import MODELS, RUNS
from scripts.demo.training import SEED, Stage, Training, adamw, prefetch

LOGGED_CASES = 120  # phrases scored during training; flava/score.py takes all
HARD = (0.1, 0.9)  # share of one-attribute swaps among the false pairs, at the start and at the end of the ramp


@dataclass(frozen=True, kw_only=True)
class FlavaStage(Stage):
    """A stage with the part of the model that it trains: "text", "image" or "fusion"."""

    name: str
    warmup: int = 50
    validate_every: int = 200
    ramp: int = 0  # steps until nearly all false pairs are one-attribute swaps
    kept: float = 1.0  # share of the patches that the multimodal encoder gets


TEXT = {"text": 4.0, "words": 2.0, "mlm": 0.2}
IMAGE = {"image": 4.0, "patches": 1.0, "cls": 0.5, "hidden": 0.5, "attention": 0.5}
FUSION = {"matching": 1.0, "masked": 0.5, "box": 1.0}
# The last stage takes all patches and trains words to attend into their phrase's box; no loss is on the maps of
# matching.
STAGES = (
    FlavaStage(name="text", steps=700, batch=112, lr=1.2e-3, lr_end=1e-5, weights=TEXT, validate_every=600),
    FlavaStage(name="image", steps=150, batch=32, lr=3e-4, lr_end=1e-5, weights=IMAGE),
    FlavaStage(
        name="fusion",
        steps=800,
        batch=20,
        lr=1.2e-3,
        lr_end=3e-4,
        weights=FUSION,
        validate_every=400,
        ramp=250,
        kept=0.4,
    ),
    FlavaStage(name="fusion", steps=400, batch=20, lr=4e-4, lr_end=1e-5, weights={**FUSION, "attention": 0.2}),
)


def load_teacher(folder: Path) -> CLIPModel:
    """The map-supervised demo CLIP."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


class FlavaTraining(Training):
    """Training of the FLAVA; `teacher` and `folder` are the folders of the CLIP and of the exported checkpoint."""

    stage: FlavaStage

    def __init__(self, stages: Sequence[FlavaStage], teacher: Path, folder: Path) -> None:
        super().__init__(stages)
        self.teacher = load_teacher(teacher)
        self.folder = folder
        self.data = load_split("val")
        self.data.cases = self.data.cases[:LOGGED_CASES]

    def build(self) -> None:
        """Create the model and its auxiliary head."""
        self.model, self.head = build_model().train(), WordPatchHead()

    def modules(self) -> dict[str, nn.Module]:
        """The model and its auxiliary head."""
        return {"model": self.model, "head": self.head}

    def enter_stage(self) -> None:
        """Initialise the towers from the CLIP, and later the multimodal encoder from the towers."""
        if self.stage_index == 0:
            start_from_clip(self.model, self.teacher, make_images(-1, 64).normalised())
        elif self.stage.name == "fusion" and self.stages[self.stage_index - 1].name != "fusion":
            self.start_fusion()
        super().enter_stage()

    @torch.no_grad()
    def start_fusion(self) -> None:
        """Initialise the multimodal encoder from the states of some training texts and images."""
        rng = random.Random(SEED)
        ids = padded([text_without_image(rng)[0].ids for _ in range(64)], PAD)
        image = image_states(self.model, make_images(-1, 64).normalised())[:, 1:].flatten(0, 1)
        torch.manual_seed(SEED)
        start_fusion(self.model, image, text_states(self.model, ids)[ids != PAD])

    def trained_modules(self) -> Sequence[nn.Module]:
        """The modules that the stage trains; all others stay as they are."""
        model, flava = self.model, self.model.flava
        if self.stage.name == "text":
            return flava.text_model, flava.text_projection, model.mlm_head
        if self.stage.name == "image":
            return flava.image_model, flava.image_projection
        projections = flava.image_to_mm_projection, flava.text_to_mm_projection
        return flava.multimodal_model, *projections, model.itm_head, model.mmm_text_head, self.head

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for the modules that the stage trains; the others get no gradient."""
        self.model.requires_grad_(False)
        parameters = [parameter for module in self.trained_modules() for parameter in module.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        return [adamw(parameters, 0.02)]

    def clipped_parameters(self) -> Iterable[nn.Parameter]:
        """All parameters that the stage trains."""
        return [parameter for group in self.optimizers[0].param_groups for parameter in group["params"]]

    def batches(self) -> Generator[ImageBatch | int, None, None]:
        """Rendered scenes, or just the number of the batch where the stage trains on texts."""
        if self.stage.name == "text":
            yield from itertools.count(self.step)
        yield from prefetch(partial(make_images, size=self.stage.batch), 100_000 * self.stage_index + self.step)

    def losses(self, batch: ImageBatch | int) -> Losses:
        """The losses that the stage weighs."""
        with torch.autocast("cpu", torch.bfloat16):
            if self.stage.name == "text":
                return text_losses(self.model, self.teacher, batch, self.stage.batch)
            if self.stage.name == "image":
                return image_losses(self.model, self.teacher, batch)
            return self.fusion_losses(batch)

    def fusion_losses(self, images: ImageBatch) -> Losses:
        """The losses of the multimodal encoder."""
        progress = min(1.0, self.step / self.stage.ramp) if self.stage.ramp else 1.0
        rng = random.Random(TRAIN_SEED * 2_000_003 + 100_000 * self.stage_index + self.step)
        rows = make_rows(images.scenes, HARD[0] + (HARD[1] - HARD[0]) * progress, rng)
        step = fused_step(self.model, self.head, images, rows, self.stage.kept)
        return {name: FUSION_LOSSES[name](step) for name in self.stage.weights}

    def validate(self) -> dict[str, float]:
        """Scores of the part of the model that the stage trains, on the validation scenes."""
        validate = validate_fusion if self.stage.name == "fusion" else validate_towers
        return validate(self.model, self.data)

    def export(self) -> None:
        """Write the checkpoint."""
        export(self.model, self.folder)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=RUNS / "flava.pt", help="file to save to and resume from")
    parser.add_argument("--teacher", type=Path, default=MODELS / "clip", help="folder of the CLIP to start from")
    parser.add_argument("--folder", type=Path, default=MODELS / "flava", help="folder for the exported model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train all remaining stages and export the model."""
    arguments = build_parser().parse_args(argv)
    FlavaTraining(STAGES, arguments.teacher, arguments.folder).run(arguments.checkpoint)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
