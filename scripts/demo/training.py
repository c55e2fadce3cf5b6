"""Training loop of the demo models: stages, checkpoints to resume from, prefetched batches, atomic export."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Full
from typing import Any, TypeVar

import torch
from torch import multiprocessing, nn

T = TypeVar("T")

SEED = 0
LOG_EVERY = 50  # steps
SAVE_SECONDS = 90


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a training schedule: number of steps, learning rate, and the weights of the losses by name."""

    steps: int
    batch: int
    lr: float
    lr_end: float
    weights: dict[str, float]
    warmup: int = 100
    validate_every: int = 400

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine from `lr` to `lr_end`."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return (self.lr_end + (self.lr - self.lr_end) * cosine) * min(1.0, (step + 1) / self.warmup)


class Training(ABC):
    """A training run in stages that can be stopped and resumed.

    `stage_index` and `step` name the next step. A resumed run computes what an uninterrupted one would have computed.
    """

    model: nn.Module

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self.stage_index = 0
        self.step = 0
        self.seconds = 0.0
        self.optimizers: list[torch.optim.Optimizer] = []

    @abstractmethod
    def build(self) -> None:
        """Create the modules of the current stage with random weights."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by name."""

    @abstractmethod
    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """New optimizers for the current stage."""

    @abstractmethod
    def batches(self) -> Generator[Any, None, None]:
        """Batches of the current stage, beginning with that of the current step."""

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, torch.Tensor]:
        """Losses by name, and further scalars for the log that have no weight in the stage."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Validation scores by name."""

    @abstractmethod
    def export(self) -> None:
        """Write the model to the folder of the current stage."""

    def enter_stage(self) -> None:
        """Create the optimizers of the stage that begins; a subclass changes the model before."""
        self.optimizers = self.make_optimizers()

    def clipped_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters whose common gradient norm is limited to 1."""
        return self.model.parameters()

    @property
    def stage(self) -> Stage:
        """The current stage; the last one after the end of training."""
        return self.stages[min(self.stage_index, len(self.stages) - 1)]

    @property
    def steps_before(self) -> int:
        """Number of steps of all earlier stages."""
        return sum(stage.steps for stage in self.stages[: self.stage_index])

    def run(self, checkpoint: Path) -> None:
        """Start the run, or resume it from `checkpoint`; train all remaining stages; export the model."""
        torch.set_num_threads(1)
        if checkpoint.exists():
            self.load(checkpoint)
        else:
            self.start()
        while self.stage_index < len(self.stages):
            self.run_stage(checkpoint)
            self.next_stage()
            self.save(checkpoint)
        self.export()

    def start(self) -> None:
        """Create the modules and optimizers of the first stage from the fixed seed."""
        torch.manual_seed(SEED)
        self.build()
        self.enter_stage()

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        state = {
            "stage": self.stage_index,
            "step": self.step,
            "seconds": self.seconds,
            "modules": {name: module.state_dict() for name, module in self.modules().items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(path)

    def load(self, path: Path) -> None:
        """Restore the run from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.stage_index, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.build()
        for name, module in self.modules().items():
            module.load_state_dict(state["modules"][name])
        self.optimizers = self.make_optimizers()
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])

    def run_stage(self, checkpoint: Path) -> None:
        """Train from the current step to the end of the stage, saving checkpoints at intervals."""
        saved, means = time.monotonic(), dict[str, float]()
        with contextlib.closing(self.batches()) as batches:
            for _, batch in zip(range(self.step, self.stage.steps), batches, strict=False):
                begin = time.monotonic()
                for name, value in self.train_step(batch).items():
                    means[name] = means.get(name, 0.0) + value / LOG_EVERY
                self.step += 1
                self.seconds += time.monotonic() - begin
                if self.step % LOG_EVERY == 0:
                    self.log(means)
                    means.clear()
                if self.step % self.stage.validate_every == 0 or self.step == self.stage.steps:
                    self.report()
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save(checkpoint)
                    saved = time.monotonic()

    def train_step(self, batch: Any) -> dict[str, float]:
        """Take one optimizer step; the losses and other logged scalars by name."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.stage.learning_rate(self.step)
        losses = self.losses(batch)
        total = sum(weight * losses[name] for name, weight in self.stage.weights.items())
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.clipped_parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    def log(self, means: dict[str, float]) -> None:
        """Print the means of the last steps."""
        shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(f"stage {self.stage_index} step {self.step} minutes {self.seconds / 60:.1f} {shown}", flush=True)

    def report(self) -> None:
        """Print the validation scores and export the model as it is."""
        scores = {name: round(value, 4) for name, value in self.validate().items()}
        line = {"stage": self.stage_index, "step": self.step, "minutes": round(self.seconds / 60, 1), **scores}
        print("validation", json.dumps(line), flush=True)
        self.export()

    def next_stage(self) -> None:
        """Go to the first step of the next stage."""
        self.stage_index, self.step = self.stage_index + 1, 0
        if self.stage_index < len(self.stages):
            self.enter_stage()


def adamw(
    parameters: Iterable[nn.Parameter], decay: float, undecayed: Iterable[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices in `parameters` only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2] + list(undecayed), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))


def prefetch(make: Callable[[int], T], first: int) -> Generator[T, None, None]:
    """Yield `make(first)`, `make(first + 1)`, ..., computed ahead in one worker process."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue(maxsize=8)
    worker = context.Process(target=_produce, args=(queue, make, first, os.getpid()), daemon=True)
    worker.start()
    try:
        while True:
            # Without a timeout, the death of the worker would block training forever.
            yield queue.get(timeout=300)
    finally:
        worker.terminate()


def _produce(queue: Queue, make: Callable[[int], Any], first: int, parent: int) -> None:
    """Fill the queue until the training process is gone: if it is killed, it cannot stop its worker."""
    torch.set_num_threads(1)
    for number in itertools.count(first):
        batch = make(number)
        while True:
            if os.getppid() != parent:
                return
            try:
                queue.put(batch, timeout=5)
                break
            except Full:
                continue


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write to, which replaces `folder` when the block ends without an error."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    for file in fresh.iterdir():
        file.chmod(0o644)
    if folder.exists():
        folder.replace(old)
    fresh.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def set_json_value(file: Path, key: str, value: str) -> None:
    """Change one entry of a JSON file."""
    settings = json.loads(file.read_text()) | {key: value}
    file.write_text(json.dumps(settings, indent=2) + "\n")
