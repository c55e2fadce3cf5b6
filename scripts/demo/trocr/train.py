"""Train the demo TrOCR on rendered lines and export it to data/demo/models/trocr.

    OMP_NUM_THREADS=1 python -m scripts.demo.trocr.train

A stopped run resumes from its checkpoint. Training uses one thread; a worker process renders the lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import VisionEncoderDecoderModel

from scripts.demo.lines.batches import LineBatch, make_batch
from scripts.demo.lines.make_lines import split_lines
from scripts.demo.paths import MODELS, RUNS
from scripts.demo.training import Stage, Training, adamw, prefetch
from scripts.demo.trocr.model import (
    EOS,
    PAD,
    WIDTH,
    build_model,
    build_tokenizer,
    change_patch,
    export,
    grid,
    patch_of,
)
from scripts.demo.trocr.score import line_set, pixel_values, score

DECAY = 0.02


@dataclass(frozen=True, kw_only=True)
class LineStage(Stage):
    """A stage with its patch size (height, width), its optimizer and the difficulty of its lines.

    The difficulty rises from `easy` to `hard` in the first `ramp` steps.
    """

    patch: tuple[int, int]
    optimizer: str
    easy: float = 0.0
    hard: float = 0.0
    ramp: int = 1
    validate_every: int = 500
    weights: dict[str, float] = field(default_factory=lambda: {"loss": 1.0, "ctc": 0.5})

    def difficulty(self, step: int) -> float:
        """The difficulty of the lines at a step."""
        return self.easy + (self.hard - self.easy) * min(1.0, step / self.ramp)


# Wide patches first: they are cheap, and recognition needs many lines; the fine grid then gives each character
# patches of its own.
STAGES = (
    LineStage(patch=(16, 8), batch=48, steps=3700, optimizer="adam", lr=1e-3, lr_end=8e-4),
    LineStage(patch=(16, 4), batch=32, steps=1300, optimizer="adam", lr=1e-3, lr_end=1e-3, hard=0.05, ramp=1000),
    LineStage(
        patch=(16, 4), batch=32, steps=6600, optimizer="muon", lr=1e-3, lr_end=1e-5, easy=0.05, hard=1.0, ramp=2200
    ),
    LineStage(
        patch=(16, 4), batch=32, steps=5000, optimizer="muon", lr=7e-4, lr_end=1e-5, easy=0.9, hard=1.0, ramp=500
    ),
)


class CtcHead(nn.Module):
    """Auxiliary CTC head on the encoder, used in training only: each column of patches predicts a character.

    The two patches of a column are combined by log-sum-exp, so that the one that contains the ink decides.
    """

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, characters)

    def forward(self, patches: torch.Tensor, shape: tuple[int, int], labels: torch.Tensor) -> torch.Tensor:
        """The CTC loss of `patches` (B, rows * columns, width) and `labels` (B, T), whose padding is the CTC blank."""
        scores = self.head(patches).float().unflatten(1, shape).logsumexp(1)  # (B, columns, characters)
        visible = labels > EOS
        steps = torch.full((len(labels),), shape[1])
        return functional.ctc_loss(
            scores.log_softmax(-1).transpose(0, 1), labels[visible], steps, visible.sum(1), PAD, zero_infinity=True
        )


def trainable(model: VisionEncoderDecoderModel) -> VisionEncoderDecoderModel:
    """The model in training mode with eager attention: in bfloat16 on a CPU faster than the fused kernel."""
    model.encoder.set_attn_implementation("eager")  # the decoder has no other
    return model.train()


class LineTraining(Training):
    """Training of the TrOCR; `folder` is the folder of the exported checkpoint."""

    stage: LineStage

    def __init__(self, stages: Sequence[LineStage], folder: Path) -> None:
        super().__init__(stages)
        self.folder = folder
        self.data = line_set(split_lines("val")[:100])

    def build(self) -> None:
        """Create the model and its auxiliary head."""
        self.model = trainable(build_model(self.stage.patch))
        self.ctc = CtcHead(self.model.config.vocab_size)

    def modules(self) -> dict[str, nn.Module]:
        """The model and its auxiliary head."""
        return {"model": self.model, "ctc": self.ctc}

    def enter_stage(self) -> None:
        """Resize the patches if the stage needs it."""
        if self.stage.patch != patch_of(self.model):
            self.model = trainable(change_patch(self.model, self.stage.patch))
        super().enter_stage()

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest."""
        muon = self.stage.optimizer == "muon"
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        inner = [p for name, p in parameters.items() if muon and p.ndim == 2 and "embed" not in name]
        chosen = {id(p) for p in inner}
        outer = [p for p in parameters.values() if id(p) not in chosen]
        optimizers: list[torch.optim.Optimizer] = [adamw(outer, DECAY, self.ctc.parameters())]
        if inner:
            # Scaled to the step length of AdamW, so that one learning rate fits both.
            optimizers.append(torch.optim.Muon(inner, lr=1e-3, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"))
        return optimizers

    def batches(self) -> Generator[LineBatch, None, None]:
        """Lines of the difficulty of their step."""
        stage, before, tokenizer = self.stage, self.steps_before, build_tokenizer()

        def make(number: int) -> LineBatch:
            return make_batch(number, stage.batch, stage.difficulty(number - before), tokenizer)

        return prefetch(make, before + self.step)

    def losses(self, batch: LineBatch) -> dict[str, torch.Tensor]:
        """Cross-entropy of the decoder and CTC loss of the encoder; for the log, token accuracy and difficulty."""
        targets = batch.ids[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            out = self.model(pixel_values(batch.pixels), decoder_input_ids=batch.ids[:, :-1])
            ctc = self.ctc(out.encoder_last_hidden_state[:, 1:], grid(self.stage.patch), targets)
        logits = out.logits.float()
        correct = (logits.argmax(-1) == targets)[targets != PAD]
        return {
            "loss": functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD),
            "ctc": ctc,
            "accuracy": correct.float().mean(),
            "difficulty": torch.tensor(self.stage.difficulty(self.step)),
        }

    def validate(self) -> dict[str, float]:
        """Character error rate, pointing and token accuracy on the validation lines."""
        scores = score(self.model, self.data)
        return {**scores.rates(self.data), "accuracy": scores.accuracy}

    def export(self) -> None:
        """Write the checkpoint."""
        export(self.model, self.folder)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=RUNS / "trocr.pt", help="file to save to and resume from")
    parser.add_argument("--folder", type=Path, default=MODELS / "trocr", help="folder for the exported model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train all remaining stages and export the model."""
    arguments = build_parser().parse_args(argv)
    LineTraining(STAGES, arguments.folder).run(arguments.checkpoint)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
