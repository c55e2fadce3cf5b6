"""Train the demo CLIP on rendered scenes and export it to data/demo/models.

    python -m scripts.demo.clip.train

Resumes by itself from runs/demo/clip.pt. One thread is enough (OMP_NUM_THREADS=1); a worker process renders.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPModel

from scripts.demo.clip.batches import Batch, stream
from scripts.demo.clip.losses import LOSSES, Heads, forward
from scripts.demo.clip.map_losses import MAP_LOSSES
from scripts.demo.clip.model import build_model, change_patch, export
from scripts.demo.clip.validate import ValidationSet, load_split, validate

ROOT = Path(__file__).resolve().parents[3]
SEED = 0
BATCH = 48
SAVE_SECONDS = 90


@dataclass(frozen=True)
class Stage:
    """One part of the schedule: learning rate from `lr` to `lr_end` (cosine), weights of the losses by name.

    `folder` is the checkpoint that the stage exports, below data/demo/models. A later stage may go on from here with
    other losses and a folder of its own: one more line in `STAGES`, one more function in `LOSSES` or `MAP_LOSSES`.
    """

    patch: int
    steps: int
    lr: float
    lr_end: float
    weights: dict[str, float]
    folder: str = "clip"
    warmup: int = 100
    validate_every: int = 400


PLAIN = {"contrast": 1.0, "phrase": 1.0, "box": 1.0}
# Cheap large patches first: binding words to looks needs many pictures, pointing then needs the fine grid.
STAGES = (
    Stage(14, 1600, 1.2e-3, 8e-4, PLAIN, "clip-plain"),
    Stage(8, 2300, 9e-4, 1e-5, PLAIN, "clip-plain"),
    # Map-supervised: goes on from the plain checkpoint, which stays as it is.
    Stage(8, 900, 6e-4, 1e-5, {**PLAIN, "phrase": 0.5, "gradcam": 1.0, "relevance": 0.75}, "clip", validate_every=300),
)


@dataclass
class Run:
    """The state of training: what a checkpoint holds. `stage` and `step` say what comes next."""

    model: CLIPModel
    heads: Heads
    optimizer: torch.optim.Optimizer
    stage: int = 0
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint; a reader never sees half of it."""
        state = {
            "patch": self.model.config.vision_config.patch_size,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(path)


def make_optimizer(model: CLIPModel, heads: Heads) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2] + list(heads.parameters()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))


def new_model(patch: int) -> CLIPModel:
    """Plain matrix attention: in bfloat16 on a CPU a quarter to a half faster than the fused kernel at this size."""
    model = build_model(patch)
    model.set_attn_implementation("eager")
    return model.train()


def start_run() -> Run:
    """A run before its first step, from the fixed seed."""
    torch.manual_seed(SEED)
    model, heads = new_model(STAGES[0].patch), Heads()
    return Run(model, heads, make_optimizer(model, heads))


def load_run(path: Path) -> Run:
    """The run as `Run.save` wrote it."""
    state = torch.load(path, weights_only=True)
    model, heads = new_model(state["patch"]), Heads()
    model.load_state_dict(state["model"])
    heads.load_state_dict(state["heads"])
    optimizer = make_optimizer(model, heads)
    optimizer.load_state_dict(state["optimizer"])
    return Run(model, heads, optimizer, state["stage"], state["step"], state["seconds"])


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then half a cosine from `lr` to `lr_end`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return (stage.lr_end + (stage.lr - stage.lr_end) * cosine) * min(1.0, (step + 1) / stage.warmup)


def train_step(run: Run, stage: Stage, batch: Batch) -> dict[str, float]:
    """One optimizer step; the losses by name."""
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(stage, run.step)
    with torch.autocast("cpu", torch.bfloat16):
        step = forward(run.model, run.heads, batch)
    losses = {name: (LOSSES | MAP_LOSSES)[name](step) for name in stage.weights}
    total = sum(weight * losses[name] for name, weight in stage.weights.items())
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def report(run: Run, data: ValidationSet, folder: Path) -> None:
    """Log the validation figures and export the model as it is."""
    figures = {name: round(value, 4) for name, value in validate(run.model, data).items()}
    line = {"stage": run.stage, "step": run.step, "minutes": round(run.seconds / 60, 1), **figures}
    print("validation", json.dumps(line), flush=True)
    export(run.model, folder)


def run_stage(run: Run, data: ValidationSet, checkpoint: Path, models: Path) -> None:
    """From `run.step` to the end of the stage, with checkpoints on the way."""
    stage = STAGES[run.stage]
    first = sum(earlier.steps for earlier in STAGES[: run.stage]) + run.step
    saved, mean = time.monotonic(), dict.fromkeys(stage.weights, 0.0)
    for batch in stream(first, BATCH):
        begin = time.monotonic()
        for name, value in train_step(run, stage, batch).items():
            mean[name] += value / 50
        run.step += 1
        run.seconds += time.monotonic() - begin
        if run.step % 50 == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in mean.items())
            print(f"stage {run.stage} step {run.step} minutes {run.seconds / 60:.1f} {shown}", flush=True)
            mean = dict.fromkeys(stage.weights, 0.0)
        if run.step % stage.validate_every == 0 or run.step == stage.steps:
            report(run, data, models / stage.folder)
        if run.step == stage.steps:
            break
        if time.monotonic() - saved > SAVE_SECONDS:
            run.save(checkpoint)
            saved = time.monotonic()


def next_stage(run: Run) -> None:
    """Step to the next stage: new patch size if it asks for one, and a fresh optimizer."""
    run.stage, run.step = run.stage + 1, 0
    if run.stage < len(STAGES):
        if STAGES[run.stage].patch != run.model.config.vision_config.patch_size:
            resized = change_patch(run.model, STAGES[run.stage].patch)
            run.model = new_model(STAGES[run.stage].patch)
            run.model.load_state_dict(resized.state_dict())
        run.optimizer = make_optimizer(run.model, run.heads)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages that are left, then export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "runs/demo/clip.pt")
    parser.add_argument("--models", type=Path, default=ROOT / "data/demo/models")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    run = load_run(arguments.checkpoint) if arguments.checkpoint.exists() else start_run()
    arguments.models.mkdir(parents=True, exist_ok=True)
    data = load_split("val")
    while run.stage < len(STAGES):
        run_stage(run, data, arguments.checkpoint, arguments.models)
        next_stage(run)
        run.save(arguments.checkpoint)
    export(run.model, arguments.models / STAGES[-1].folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
