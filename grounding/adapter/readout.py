"""Read the image encoder at one of its blocks, as if that block were the last.

What follows the blocks (norm, pooling, projection) is run by the adapter's own `encode_images`, in which the blocks do
not compute: each returns a tensor that is given. So it works for any adapter, without a description of that part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from grounding.adapter.recorder import find_module


@contextlib.contextmanager
def cut_blocks(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Inside the block the graph ends at every block of a stack: the pass goes on with its output off the graph.

    Yields block -> output, on the graph that begins in the block.
    """
    outputs: dict[str, Any] = {}

    def cut(path: str, output: Any) -> Any:
        outputs[path] = output
        return replaced(output, hidden_of(output).detach())

    with contextlib.ExitStack() as stack:
        for path in blocks:
            module = find_module(model, path)
            hook = module.register_forward_hook(lambda _module, _args, output, p=path: cut(p, output))
            stack.callback(hook.remove)
        yield outputs


@contextlib.contextmanager
def ending_in(model: nn.Module, outputs: Mapping[str, Any], hidden: Tensor) -> Iterator[None]:
    """Inside the block the blocks of a stack do not compute: the last returns `hidden`, the others what they returned
    in an earlier pass, `outputs` (first to last). The model is restored afterwards."""
    last = list(outputs)[-1]
    with contextlib.ExitStack() as stack:
        for path, output in outputs.items():
            given = replaced(output, hidden) if path == last else output
            stack.enter_context(_returning(find_module(model, path), given))
        yield


@contextlib.contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside the block the module returns `output`."""
    own = vars(module).get("forward")  # of a library that replaces it (offloading)
    module.forward = lambda *_args, **_keywords: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state in the output of a block."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def replaced(output: Any, hidden: Tensor) -> Any:
    """Return the output of a block with another hidden state."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
