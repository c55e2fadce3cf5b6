"""The shared training loop: resumed runs, prefetched batches, atomic export."""

import itertools
import multiprocessing

import pytest
import torch
from torch import nn

from scripts.demo import training
from scripts.demo.training import Stage, Training, adamw, prefetch, replaced

STAGES = (
    Stage(steps=3, batch=2, lr=0.1, lr_end=0.05, weights={"loss": 1.0}, validate_every=2),
    Stage(steps=4, batch=2, lr=0.05, lr_end=0.01, weights={"loss": 1.0, "size": 0.5}, validate_every=2),
)


class StoppedError(Exception):
    """Stands for the end of the process."""


class Regression(Training):
    """A linear model with random noise in its losses and new weights at the beginning of the second stage."""

    def __init__(self, interrupt_at=None):
        super().__init__(STAGES)
        self.interrupt_at = interrupt_at
        self.calls = []

    def build(self):
        self.model = nn.Linear(4, 1)

    def modules(self):
        return {"model": self.model}

    def enter_stage(self):
        if self.stage_index == 1:
            nn.init.normal_(self.model.weight)
        super().enter_stage()

    def make_optimizers(self):
        return [adamw(self.model.parameters(), 0.1)]

    def batches(self):
        for number in itertools.count(self.steps_before + self.step):
            yield torch.full((self.stage.batch, 4), number / 10)

    def losses(self, batch):
        if (self.stage_index, self.step) == self.interrupt_at:
            raise StoppedError
        self.calls.append((self.stage_index, self.step))
        error = self.model(batch + torch.rand(batch.shape)) - 1
        return {"loss": error.square().mean(), "size": self.model.weight.square().mean(), "unweighted": error.mean()}

    def validate(self):
        torch.rand(7)  # validation may draw random numbers, too
        return {"norm": self.model.weight.norm().item()}

    def export(self):
        torch.rand(1)


@pytest.mark.parametrize("interrupt_at", [(0, 1), (0, 2), (1, 0), (1, 3)])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch, interrupt_at):
    monkeypatch.setattr(training, "SAVE_SECONDS", -1)  # save after every step
    whole = Regression()
    whole.run(tmp_path / "whole.pt")
    stopped = Regression(interrupt_at)
    with pytest.raises(StoppedError):
        stopped.run(tmp_path / "run.pt")
    resumed = Regression()
    resumed.run(tmp_path / "run.pt")
    assert stopped.calls + resumed.calls == whole.calls == [*((0, n) for n in range(3)), *((1, n) for n in range(4))]
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert torch.equal(resumed.model.bias, whole.model.bias)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["run.pt", "whole.pt"]


def test_a_finished_run_trains_no_further(tmp_path):
    Regression().run(tmp_path / "run.pt")
    again = Regression()
    again.run(tmp_path / "run.pt")
    assert again.calls == []


def test_the_loop_validates_at_intervals_and_at_the_end_of_a_stage(tmp_path, capsys):
    Regression().run(tmp_path / "run.pt")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation")]
    assert [line.split('"minutes"')[0] for line in lines] == [
        f'validation {{"stage": {stage}, "step": {step}, ' for stage, step in [(0, 2), (0, 3), (1, 2), (1, 4)]
    ]


def test_the_learning_rate_warms_up_and_falls():
    stage = Stage(steps=100, batch=1, lr=1.0, lr_end=0.1, weights={}, warmup=10)
    rates = [stage.learning_rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[50] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_prefetched_batches_come_in_order_and_their_worker_ends():
    batches = prefetch(lambda number: torch.full((2,), number), 5)
    assert [next(batches).tolist() for _ in range(12)] == [[number] * 2 for number in range(5, 17)]
    [worker] = multiprocessing.active_children()
    batches.close()
    worker.join(20)
    assert not worker.is_alive()


def test_a_failed_export_keeps_the_previous_folder(tmp_path):
    folder = tmp_path / "model"
    with replaced(folder) as fresh:
        (fresh / "weights").write_text("old")
    with pytest.raises(FileNotFoundError), replaced(folder) as fresh:
        (fresh / "missing/weights").write_text("new")
    assert (folder / "weights").read_text() == "old"
    with replaced(folder) as fresh:
        (fresh / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
