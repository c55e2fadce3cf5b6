"""Train the demo TrOCR on rendered lines and export it to data/demo/models/trocr.

    OMP_NUM_THREADS=1 python -m scripts.demo.trocr.train

Resumes by itself from runs/demo/trocr.pt. One thread is enough; a worker process renders.
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
from torch import nn
from torch.nn import functional
from transformers import VisionEncoderDecoderModel

from scripts.demo.lines.batches import LineBatch, stream
from scripts.demo.lines.make_lines import split_lines
from scripts.demo.trocr.model import EOS, PAD, WIDTH, build_model, change_patch, export, grid, patch_of
from scripts.demo.trocr.score import LineSet, line_set, pixel_values, score

ROOT = Path(__file__).resolve().parents[3]
SEED = 0
SAVE_SECONDS = 75
CTC_WEIGHT = 0.5
DECAY = 0.02


@dataclass(frozen=True)
class Stage:
    """One part of the schedule: learning rate from `lr` to `lr_end` (cosine).

    The difficulty of the lines rises from `easy` to `hard` in the first `ramp` steps.
    """

    patch: tuple[int, int]
    batch: int
    steps: int
    optimizer: str
    lr: float
    lr_end: float
    easy: float = 0.0
    hard: float = 0.0
    ramp: int = 1
    warmup: int = 100
    validate_every: int = 500

    def difficulty(self, step: int) -> float:
        """The difficulty of the lines at a step."""
        return self.easy + (self.hard - self.easy) * min(1.0, step / self.ramp)


# Cheap wide patches first: reading needs many lines, the fine grid then gives every character patches of its own.
STAGES = (
    Stage((16, 8), 48, 3700, "adam", 1e-3, 8e-4),
    Stage((16, 4), 32, 1300, "adam", 1e-3, 1e-3, 0.0, 0.05, 1000),
    Stage((16, 4), 32, 6600, "muon", 1e-3, 1e-5, 0.05, 1.0, 2200),
    Stage((16, 4), 32, 5000, "muon", 7e-4, 1e-5, 0.9, 1.0, 500),
)


class ColumnReader(nn.Module):
    """Auxiliary CTC head on the encoder, thrown away after training: each column of patches names a character.

    The two patches of a column are pooled softly, so that the one with the ink in it may speak for both.
    """

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, patches: torch.Tensor, shape: tuple[int, int], labels: torch.Tensor) -> torch.Tensor:
        """The CTC loss; `patches` (B, rows * columns, width), `labels` (B, T) with padding, which is also the blank."""
        scores = self.head(patches).float().unflatten(1, shape).logsumexp(1)  # (B, columns, characters)
        written = labels > EOS
        steps = torch.full((len(labels),), shape[1])
        return functional.ctc_loss(
            scores.log_softmax(-1).transpose(0, 1), labels[written], steps, written.sum(1), PAD, zero_infinity=True
        )


@dataclass
class Run:
    """The state of training: what a checkpoint holds. `stage` and `step` say what comes next."""

    model: VisionEncoderDecoderModel
    reader: ColumnReader
    optimizers: list[torch.optim.Optimizer]
    stage: int = 0
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint; a reader never sees half of it."""
        state = {
            "patch": patch_of(self.model),
            "model": self.model.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(path)


def make_optimizers(kind: str, model: VisionEncoderDecoderModel, reader: ColumnReader) -> list[torch.optim.Optimizer]:
    """AdamW for all, with weight decay on matrices; or Muon for the matrices of the blocks and AdamW for the rest."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = [p for name, p in parameters.items() if kind == "muon" and p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in inner}
    outer = [p for p in parameters.values() if id(p) not in chosen]
    groups = [
        {"params": [p for p in outer if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in outer if p.ndim < 2] + list(reader.parameters()), "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))]
    if inner:
        # Scaled to the step length of AdamW: one learning rate serves both.
        optimizers.append(torch.optim.Muon(inner, lr=1e-3, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def trainable(model: VisionEncoderDecoderModel) -> VisionEncoderDecoderModel:
    """Plain matrix attention: in bfloat16 on a CPU faster than the fused kernel at this size."""
    model.encoder.set_attn_implementation("eager")  # the decoder knows no other
    return model.train()


def start_run() -> Run:
    """A run before its first step, from the fixed seed."""
    torch.manual_seed(SEED)
    model = trainable(build_model(STAGES[0].patch))
    reader = ColumnReader(model.config.vocab_size)
    return Run(model, reader, make_optimizers(STAGES[0].optimizer, model, reader))


def load_run(path: Path) -> Run:
    """The run as `Run.save` wrote it."""
    state = torch.load(path, weights_only=True)
    model = trainable(build_model(state.pop("patch")))
    reader = ColumnReader(model.config.vocab_size)
    model.load_state_dict(state.pop("model"))
    reader.load_state_dict(state.pop("reader"))
    optimizers = make_optimizers(STAGES[min(state["stage"], len(STAGES) - 1)].optimizer, model, reader)
    for optimizer, saved in zip(optimizers, state.pop("optimizers"), strict=True):
        optimizer.load_state_dict(saved)
    return Run(model, reader, optimizers, **state)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then half a cosine from `lr` to `lr_end`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return (stage.lr_end + (stage.lr - stage.lr_end) * cosine) * min(1.0, (step + 1) / stage.warmup)


def train_step(run: Run, stage: Stage, batch: LineBatch) -> dict[str, float]:
    """One optimizer step; losses and token accuracy by name."""
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = learning_rate(stage, run.step)
    targets = batch.ids[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        out = run.model(pixel_values(batch.pixels), decoder_input_ids=batch.ids[:, :-1])
        reading = run.reader(out.encoder_last_hidden_state[:, 1:], grid(stage.patch), targets)
    logits = out.logits.float()
    writing = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
    run.model.zero_grad(set_to_none=True)
    run.reader.zero_grad(set_to_none=True)
    (writing + CTC_WEIGHT * reading).backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
    right = (logits.argmax(-1) == targets)[targets != PAD]
    return {"loss": writing.item(), "ctc": reading.item(), "accuracy": right.float().mean().item()}


def report(run: Run, data: LineSet, folder: Path) -> None:
    """Log the validation figures and export the model as it is."""
    scores = score(run.model, data)
    figures = {name: round(value, 4) for name, value in scores.figures(data).items()}
    figures["accuracy"] = round(scores.accuracy, 4)
    line = {"stage": run.stage, "step": run.step, "minutes": round(run.seconds / 60, 1), **figures}
    print("validation", json.dumps(line), flush=True)
    export(run.model, folder)


def run_stage(run: Run, data: LineSet, checkpoint: Path, folder: Path) -> None:
    """From `run.step` to the end of the stage, with checkpoints on the way."""
    stage = STAGES[run.stage]
    before = sum(earlier.steps for earlier in STAGES[: run.stage])
    saved, mean = time.monotonic(), {"loss": 0.0, "ctc": 0.0, "accuracy": 0.0}
    for batch in stream(before + run.step, stage.batch, lambda number: stage.difficulty(number - before)):
        begin = time.monotonic()
        figures = train_step(run, stage, batch)
        run.step += 1
        run.seconds += time.monotonic() - begin
        mean = {name: mean[name] + figures[name] / 50 for name in mean}
        if run.step % 50 == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in mean.items())
            where = f"stage {run.stage} step {run.step} minutes {run.seconds / 60:.1f}"
            print(f"{where} {shown} difficulty {stage.difficulty(run.step):.2f}", flush=True)
            mean = dict.fromkeys(mean, 0.0)
        if run.step % stage.validate_every == 0 or run.step == stage.steps:
            report(run, data, folder)
        if run.step == stage.steps:
            break
        if time.monotonic() - saved > SAVE_SECONDS:
            run.save(checkpoint)
            saved = time.monotonic()


def next_stage(run: Run) -> None:
    """Step to the next stage: new patch size if it asks for one, and fresh optimizers."""
    run.stage, run.step = run.stage + 1, 0
    if run.stage < len(STAGES):
        stage = STAGES[run.stage]
        if stage.patch != patch_of(run.model):
            run.model = trainable(change_patch(run.model, stage.patch))
        run.optimizers = make_optimizers(stage.optimizer, run.model, run.reader)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages that are left, then export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "runs/demo/trocr.pt")
    parser.add_argument("--folder", type=Path, default=ROOT / "data/demo/models/trocr")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    run = load_run(arguments.checkpoint) if arguments.checkpoint.exists() else start_run()
    arguments.folder.parent.mkdir(parents=True, exist_ok=True)
    data = line_set(split_lines("val")[:100])
    while run.stage < len(STAGES):
        run_stage(run, data, arguments.checkpoint, arguments.folder)
        next_stage(run)
        run.save(arguments.checkpoint)
    export(run.model, arguments.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
