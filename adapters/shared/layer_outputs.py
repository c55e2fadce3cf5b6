"""Record the outputs of all modules of a model in one forward pass."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from grounding.adapter.patch_layout import Layout, find_layout
from grounding.adapter.recorder import Recorder


@dataclass(frozen=True)
class LayerOutput:
    """A module that ran in a pass: its path, the shape of its (first) output, and the path of the module whose output
    it took, where that is known."""

    path: str
    shape: tuple[int, ...]
    source: str = ""

    def layout(self, size: tuple[int, int]) -> Layout | None:
        """Of an output of one picture that could be maps over an input of this (height, width), channels first or last;
        None of another, and of 1 x 1."""
        maps = len(self.shape) == 4 and self.shape[0] == 1
        return find_layout(self.shape, size, 0, pyramid=True) if maps else None

    def cells(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of what could be maps."""
        found = self.layout(size)
        return (found.rows, found.columns) if found else None

    @property
    def tokens(self) -> int:
        """How many tokens an output of one picture has, 0 where it is none."""
        return self.shape[1] if len(self.shape) == 3 and self.shape[0] == 1 else 0


def record_outputs(model: nn.Module, run: Callable[[], object]) -> list[LayerOutput]:
    """The modules that ran once and gave a tensor (or a tuple that begins with one), in the order of finishing."""
    found: dict[str, tuple[int, ...]] = {}
    sources, made = dict[str, str](), WeakTensorKeyDictionary()
    ran: Counter[str] = Counter()

    def look(path: str, given: Any, output: Any) -> None:
        ran[path] += 1
        sources[path] = made.get(given[0], "") if given and isinstance(given[0], Tensor) else ""
        tensor = output[0] if isinstance(output, tuple) and output else output
        if isinstance(tensor, Tensor):
            found[path] = tuple(tensor.shape)
            made[tensor] = path

    with Recorder(model), contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            if path:
                handle = module.register_forward_hook(lambda _m, given, out, p=path: look(p, given, out))
                hooks.callback(handle.remove)
        run()
    return [LayerOutput(path, shape, sources[path]) for path, shape in found.items() if ran[path] == 1]
