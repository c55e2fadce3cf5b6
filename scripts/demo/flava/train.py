"""Train the demo FLAVA from the demo CLIP, on texts and rendered scenes, and export it to data/demo/models/flava.

    python -m scripts.demo.flava.train

Resumes by itself from runs/demo/flava.pt. One thread is enough (OMP_NUM_THREADS=1); a worker process renders.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel, FlavaForPreTraining

from scripts.demo.clip.validate import ValidationSet, load_split
from scripts.demo.flava.batches import TRAIN_SEED, Pictures, make_pictures, stream, text_without_picture
from scripts.demo.flava.losses import FUSION_LOSSES, Pointer, fused_step, image_states, text_states
from scripts.demo.flava.model import build_model, export, start_from_clip
from scripts.demo.flava.rows import make_rows
from scripts.demo.flava.start import start_fusion
from scripts.demo.flava.text import PAD, padded
from scripts.demo.flava.towers import Losses, image_losses, text_losses
from scripts.demo.flava.validate import validate_fusion, validate_towers

ROOT = Path(__file__).resolve().parents[3]
SEED = 0
SAVE_SECONDS = 90
LOG_EVERY = 50
LOGGED_CASES = 120  # validation along the way; score_flava.py takes all


@dataclass(frozen=True)
class Stage:
    """One part of the schedule: which parameters learn, from which losses, at a rate from `lr` to `lr_end` (cosine)."""

    name: str
    steps: int
    batch: int
    lr: float
    lr_end: float
    weights: dict[str, float]
    warmup: int = 50
    validate_every: int = 200
    ramp: int = 0  # steps until nearly all false pairs are one-attribute swaps
    kept: float = 1.0  # share of the patches that the multimodal encoder sees


FUSED = {"matching": 1.0, "masked": 0.5, "box": 1.0}
STAGES = (
    Stage("text", 700, 112, 1.2e-3, 1e-5, {"text": 4.0, "words": 2.0, "mlm": 0.2}, validate_every=600),
    Stage("image", 150, 32, 3e-4, 1e-5, {"image": 4.0, "patches": 1.0, "cls": 0.5, "hidden": 0.5, "attention": 0.5}),
    Stage("fusion", 800, 20, 1.2e-3, 3e-4, FUSED, validate_every=400, ramp=250, kept=0.4),
    # All patches, and words that look into their phrase's box; the maps of matching are not told where to look.
    Stage("fusion", 400, 20, 4e-4, 1e-5, {**FUSED, "attention": 0.2}),
)
HARD = (0.1, 0.9)  # share of one-attribute swaps among the false pairs, at the start and at the end of the ramp


@dataclass
class Run:
    """The state of training: what a checkpoint holds. `stage` and `step` say what comes next."""

    model: FlavaForPreTraining
    pointer: Pointer
    optimizer: torch.optim.Optimizer
    stage: int = 0
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint; a reader never sees half of it."""
        state = {
            "model": self.model.state_dict(),
            "pointer": self.pointer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(path)


def learning_parameters(run: Run, stage: Stage) -> list[nn.Parameter]:
    """What the stage trains; everything else stays as it is."""
    model, flava = run.model, run.model.flava
    fusion = (flava.multimodal_model, flava.image_to_mm_projection, flava.text_to_mm_projection)
    modules = {
        "text": (flava.text_model, flava.text_projection, model.mlm_head),
        "image": (flava.image_model, flava.image_projection),
        "fusion": (*fusion, model.itm_head, model.mmm_text_head, run.pointer),
    }[stage.name]
    return [parameter for module in modules for parameter in module.parameters()]


def make_optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.02},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))


def enter_stage(run: Run, stage: int) -> None:
    """Set what learns, and a fresh optimizer for it."""
    run.stage, run.step = stage, 0
    if stage < len(STAGES):
        if STAGES[stage].name == "fusion" and STAGES[stage - 1].name != "fusion":
            prepare_fusion(run.model)
        run.model.requires_grad_(False)
        parameters = learning_parameters(run, STAGES[stage])
        for parameter in parameters:
            parameter.requires_grad_(True)
        run.optimizer = make_optimizer(parameters)


@torch.no_grad()
def prepare_fusion(model: FlavaForPreTraining) -> None:
    """The start of the multimodal encoder, from the states of some training texts and pictures."""
    rng = random.Random(SEED)
    ids = padded([text_without_picture(rng)[0].ids for _ in range(64)], PAD)
    image = image_states(model, make_pictures(-1, 64).normalised())[:, 1:].flatten(0, 1)
    torch.manual_seed(SEED)
    start_fusion(model, image, text_states(model, ids)[ids != PAD])


def start_run(teacher: CLIPModel) -> Run:
    """A run before its first step, from the fixed seed and the CLIP's weights."""
    torch.manual_seed(SEED)
    model = build_model().train()
    start_from_clip(model, teacher, make_pictures(-1, 64).normalised())
    run = Run(model, Pointer(), make_optimizer(list(model.parameters())))
    enter_stage(run, 0)
    return run


def load_run(path: Path) -> Run:
    """The run as `Run.save` wrote it."""
    state = torch.load(path, weights_only=True)
    model = build_model().train()
    model.load_state_dict(state["model"])
    run = Run(model, Pointer(), make_optimizer(list(model.parameters())))
    run.pointer.load_state_dict(state["pointer"])
    enter_stage(run, state["stage"])
    model.load_state_dict(state["model"])  # once more: entering a stage may start a part anew
    if state["step"]:
        run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.seconds = state["step"], state["seconds"]
    return run


def load_teacher(folder: Path) -> CLIPModel:
    """The map-supervised demo CLIP."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then half a cosine from `lr` to `lr_end`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return (stage.lr_end + (stage.lr - stage.lr_end) * cosine) * min(1.0, (step + 1) / stage.warmup)


def loss_stream(run: Run, teacher: CLIPModel) -> Iterator[Callable[[], Losses]]:
    """For each step left in the stage, the function that computes its losses."""
    stage = STAGES[run.stage]
    if stage.name == "text":
        for number in range(run.step, stage.steps):
            yield lambda number=number: text_losses(run.model, teacher, number, stage.batch)
        return
    first = 100_000 * run.stage + run.step
    for pictures, _ in zip(stream(first, stage.batch), range(run.step, stage.steps), strict=False):
        if stage.name == "image":
            yield lambda pictures=pictures: image_losses(run.model, teacher, pictures)
        else:
            yield lambda pictures=pictures: fusion_losses(run, pictures)


def fusion_losses(run: Run, pictures: Pictures) -> Losses:
    """The losses of the multimodal encoder that the stage weighs."""
    stage = STAGES[run.stage]
    progress = min(1.0, run.step / stage.ramp) if stage.ramp else 1.0
    rng = random.Random(TRAIN_SEED * 2_000_003 + 100_000 * run.stage + run.step)
    rows = make_rows(pictures.scenes, HARD[0] + (HARD[1] - HARD[0]) * progress, rng)
    step = fused_step(run.model, run.pointer, pictures, rows, stage.kept)
    return {name: FUSION_LOSSES[name](step) for name in stage.weights}


def train_step(run: Run, compute: Callable[[], Losses]) -> dict[str, float]:
    """One optimizer step; the losses by name."""
    stage = STAGES[run.stage]
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(stage, run.step)
    with torch.autocast("cpu", torch.bfloat16):
        losses = compute()
    total = sum(weight * losses[name] for name, weight in stage.weights.items())
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()
    learning = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(learning, 1.0)
    run.optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def report(run: Run, data: ValidationSet, folder: Path) -> None:
    """Log the validation figures and export the model as it is."""
    validate = validate_fusion if STAGES[run.stage].name == "fusion" else validate_towers
    figures = {name: round(value, 4) for name, value in validate(run.model, data).items()}
    line = {"stage": run.stage, "step": run.step, "minutes": round(run.seconds / 60, 1), **figures}
    print("validation", json.dumps(line), flush=True)
    export(run.model, folder)


def run_stage(run: Run, teacher: CLIPModel, data: ValidationSet, checkpoint: Path, folder: Path) -> None:
    """From `run.step` to the end of the stage, with checkpoints on the way."""
    stage = STAGES[run.stage]
    saved, mean = time.monotonic(), dict.fromkeys(stage.weights, 0.0)
    for compute in loss_stream(run, teacher):
        begin = time.monotonic()
        for name, value in train_step(run, compute).items():
            mean[name] = mean.get(name, 0.0) + value / LOG_EVERY
        run.step += 1
        run.seconds += time.monotonic() - begin
        if run.step % LOG_EVERY == 0:
            shown = " ".join(f"{name} {value:.4f}" for name, value in mean.items())
            print(f"stage {run.stage} step {run.step} minutes {run.seconds / 60:.1f} {shown}", flush=True)
            mean = dict.fromkeys(stage.weights, 0.0)
        if run.step % stage.validate_every == 0 or run.step == stage.steps:
            report(run, data, folder)
        if time.monotonic() - saved > SAVE_SECONDS:
            run.save(checkpoint)
            saved = time.monotonic()


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages that are left, then export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "runs/demo/flava.pt")
    parser.add_argument("--teacher", type=Path, default=ROOT / "data/demo/models/clip")
    parser.add_argument("--folder", type=Path, default=ROOT / "data/demo/models/flava")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    teacher = load_teacher(arguments.teacher)
    run = load_run(arguments.checkpoint) if arguments.checkpoint.exists() else start_run(teacher)
    data = load_split("val")
    data.cases = data.cases[:LOGGED_CASES]
    while run.stage < len(STAGES):
        run_stage(run, teacher, data, arguments.checkpoint, arguments.folder)
        enter_stage(run, run.stage + 1)
        run.save(arguments.checkpoint)
    export(run.model, arguments.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
