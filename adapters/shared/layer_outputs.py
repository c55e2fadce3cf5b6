"""Record the outputs of all modules of a model in one forward pass."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from grounding.adapter.patch_tokens import Layout, find_layout
from grounding.adapter.recorder import Recorder


@dataclass(frozen=True)
class LayerOutput:
    """The output of a module in one pass: module path, shape of its (first) output, and path of the module whose output
    was its input ("" if not known)."""

    path: str
    shape: tuple[int, ...]
    source: str = ""

    def layout(self, size: tuple[int, int]) -> Layout | None:
        """Layout of an output that could be feature maps (channels first or last) of one image of this (height, width).

        None for any other shape, and for 1 x 1.
        """
        maps = len(self.shape) == 4 and self.shape[0] == 1
        return find_layout(self.shape, size, 0, pyramid=True) if maps else None

    def cells(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of an output that could be feature maps, else None."""
        found = self.layout(size)
        return (found.rows, found.columns) if found else None

    @property
    def tokens(self) -> int:
        """Number of tokens in an output of one image, 0 for an output of another shape."""
        return self.shape[1] if len(self.shape) == 3 and self.shape[0] == 1 else 0


def record_outputs(model: nn.Module, run: Callable[[], object]) -> list[LayerOutput]:
    """Outputs of the modules that ran once and returned a tensor (or a tuple beginning with one), as they finished."""
    found: dict[str, tuple[int, ...]] = {}
    sources, made = dict[str, str](), WeakTensorKeyDictionary()
    ran: Counter[str] = Counter()

    def record(path: str, given: Any, output: Any) -> None:
        ran[path] += 1
        sources[path] = made.get(given[0], "") if given and isinstance(given[0], Tensor) else ""
        tensor = output[0] if isinstance(output, tuple) and output else output
        if isinstance(tensor, Tensor):
            found[path] = tuple(tensor.shape)
            made[tensor] = path

    with Recorder(model), contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            if path:
                handle = module.register_forward_hook(lambda _m, given, out, p=path: record(p, given, out))
                hooks.callback(handle.remove)
        run()
    return [LayerOutput(path, shape, sources[path]) for path, shape in found.items() if ran[path] == 1]
