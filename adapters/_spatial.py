"""Layers with a spatial size, found by running a model once and not by believing its names."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from grounding.layouts import find_layout
from grounding.recorder import Recorder


@dataclass(frozen=True)
class Ran:
    """A module that ran in a pass, in the order of finishing: its path, and the shape of its (first) output."""

    path: str
    shape: tuple[int, ...]

    def cells(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of an output that is maps over an input of this (height, width), channels first or last; None
        of another, and of 1 x 1."""
        found = find_layout(self.shape, size, 0, pyramid=True) if len(self.shape) == 4 else None
        return (found.rows, found.columns) if found else None


def all_that_ran(model: nn.Module, run: Callable[[], object]) -> list[Ran]:
    """The modules that ran once and gave a tensor (or a tuple that begins with one), in the order of finishing."""
    found: dict[str, tuple[int, ...]] = {}
    ran: Counter[str] = Counter()

    def look(path: str, output: Any) -> None:
        ran[path] += 1
        tensor = output[0] if isinstance(output, tuple) and output else output
        if isinstance(tensor, Tensor):
            found[path] = tuple(tensor.shape)

    with Recorder(model), contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            if path:
                handle = module.register_forward_hook(lambda _m, _a, out, p=path: look(p, out))
                hooks.callback(handle.remove)
        run()
    return [Ran(path, shape) for path, shape in found.items() if ran[path] == 1]
