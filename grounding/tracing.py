"""The middle of the engine: forward passes, and chunks of targets with the signals their methods need.

A method at a fast tap (`Adapter.fast_taps`) needs no graph through the model: the pass runs without gradients, and the
scores are recomputed from the tap onwards with one shift vector per target. Everything else takes the slow, right way:
one graph, one backward per group of targets that has each picture once. A method with a backward rule gets a pass of
its own on the slow way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grounding.adapter import Adapter
from grounding.errors import NumericError
from grounding.plan import Column, wanted_signals
from grounding.recorder import Recorder
from grounding.trace import Trace
from grounding.types import Inputs, Targets

# Numbers that the fast way may hold at once per target: rows of attention and hidden features; about 0.25 GB.
FAST_BUDGET = 60_000_000


@dataclass(frozen=True, eq=False)
class Chunk:
    """The columns that can be computed from a trace, and which of the K targets it is about."""

    columns: tuple[Column, ...]
    trace: Trace
    members: list[int]
    scores: Tensor


def trace(adapter: Adapter, inputs: Inputs, targets: Targets, plan: Sequence[Column]) -> Generator[Chunk, None, None]:
    """Run the model as often as the plan needs (mostly once) and yield every chunk of targets.

    The first chunk has a target of every picture. Raises NumericError for NaN or Inf, LayerError, ModelError.
    """
    fast = [column for column in plan if is_fast(adapter, targets, column)]
    rules = dict.fromkeys(column.method.rule for column in plan if column not in fast)
    for rule in dict.fromkeys([None, *rules]):
        slow = [column for column in plan if column not in fast and column.method.rule == rule]
        if slow or (fast and rule is None):
            yield from _one_pass(adapter, inputs, targets, slow, fast if rule is None else [], rule)


def is_fast(adapter: Adapter, targets: Targets, column: Column) -> bool:
    """Whether a column needs no more than shifts at fast taps."""
    taps = adapter.fast_taps if targets.kind in adapter.fast_kinds else {}
    needs = column.method.needs
    shift_alone = "shift" in needs and needs <= {"activations", "shift"}
    return shift_alone and len(column.paths) == 1 and column.paths[0] in taps


def _one_pass(
    adapter: Adapter,
    inputs: Inputs,
    targets: Targets,
    slow: Sequence[Column],
    fast: Sequence[Column],
    rule: str | None,
) -> Iterator[Chunk]:
    taps, attention = wanted_signals(adapter, slow)
    starts = adapter.fast_taps if targets.kind in adapter.fast_kinds else {}
    needed = {path: False for tap, others in starts.items() for path in (tap, *others)} | taps
    differentiated = any([*taps.values(), *attention.values()]) or rule is not None
    record = None if differentiated else _remembered(adapter, inputs, targets, needed, attention)
    if record is not None:
        scores = _scores_again(record, inputs, next(iter(starts)))
        if slow:
            yield from _slow_chunks(record, slow, {}, {}, scores)
    else:
        with Recorder(adapter.model, needed, attention, rule) as recorder:
            found = adapter.forward(inputs, targets)
            recorder.check()
            assert found is not None
            scores = found
            for path, weights in recorder.weights.items():
                _finite(weights, f"attention weights of {path}")
            if not differentiated:
                inputs.memory.update(recorder.outputs | recorder.weights)
                inputs.memory.update({name: inputs.tensors[name] for name in inputs.per_picture})
            record = _record(adapter, inputs, targets, recorder.outputs, recorder.weights)
            _finite(scores, "scores")
            if slow:
                yield from _slow_chunks(record, slow, taps, attention, scores)
    with Recorder(adapter.model):  # without the taps: parts of the model run again
        for tap, wanted_rule in dict.fromkeys((column.paths[0], column.method.rule) for column in fast):
            columns = tuple(c for c in fast if c.paths == (tap,) and c.method.rule == wanted_rule)
            yield from _fast_chunks(record, columns, inputs, scores)


def _record(
    adapter: Adapter, inputs: Inputs, targets: Targets, outputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Trace:
    return Trace(
        adapter=adapter,
        targets=targets,
        grid=adapter.grid(inputs),
        needs=frozenset(),
        outputs=outputs,
        gradients={},
        shifts={},
        weights=weights,
        weight_gradients={},
    )


def _remembered(
    adapter: Adapter, inputs: Inputs, targets: Targets, taps: Mapping[str, bool], attention: Mapping[str, bool]
) -> Trace | None:
    """The record of an earlier pass over the same pictures, if it holds all that is wanted."""
    memory = inputs.memory
    if any(memory.get(name) is not inputs.tensors[name] for name in inputs.per_picture):
        return None  # other pictures, or none yet
    if not adapter.fast_taps or targets.kind not in adapter.fast_kinds or not {*taps, *attention} <= memory.keys():
        return None
    outputs, weights = ({path: memory[path] for path in paths} for paths in (taps, attention))
    return _record(adapter, inputs, targets, outputs, weights)


def _scores_again(record: Trace, inputs: Inputs, tap: str) -> Tensor:
    """The scores from a remembered fast tap."""
    features = record.outputs[tap]
    shift = torch.zeros(len(record.targets), features.shape[-1], dtype=features.dtype, device=features.device)
    with Recorder(record.adapter.model):
        scores = record.adapter.score_from(tap, inputs, record.targets, shift, record.outputs)
    _finite(scores, "scores")
    return scores


def _slow_chunks(
    record: Trace,
    columns: Sequence[Column],
    taps: Mapping[str, bool],
    attention: Mapping[str, bool],
    scores: Tensor,
) -> Iterator[Chunk]:
    """One backward per group: as pictures do not influence each other, a sum over them gives each its own gradient."""
    wanted_taps = [path for path, gradient in taps.items() if gradient]
    wanted_attention = [path for path, gradient in attention.items() if gradient]
    leaves = [record.outputs[p] for p in wanted_taps] + [record.weights[p] for p in wanted_attention]
    groups = one_per_picture(record.targets.image.tolist())
    if not leaves and not record.adapter.text_conditioned(record.targets.kind, gradient=False):
        groups = groups[:1]  # nothing depends on the target: one per picture says it all
    for number, members in enumerate(groups):
        gradients = _gradients(scores[members].sum(), leaves, last=number == len(groups) - 1)
        named = dict(zip([*wanted_taps, *wanted_attention], gradients, strict=True))
        for path, gradient in named.items():
            _finite(gradient, f"gradient at {path}")
        chunk = record.of(
            members,
            gradients={path: named[path] for path in wanted_taps},
            weight_gradients={path: named[path] for path in wanted_attention},
        )
        yield Chunk(tuple(columns), chunk, members, scores.detach())


def _fast_chunks(record: Trace, columns: tuple[Column, ...], inputs: Inputs, scores: Tensor) -> Iterator[Chunk]:
    """All targets at once, or as many as fit: gradients with respect to one shift vector per target, at one tap."""
    [tap], rule = columns[0].paths, columns[0].method.rule
    features = record.outputs[tap].detach()
    size = max(1, FAST_BUDGET // max(1, features[0].numel() // 4))
    width = features.shape[-1]
    for first in range(0, len(record.targets), size):
        members = list(range(first, min(first + size, len(record.targets))))
        targets = record.targets.select(members)
        shift = torch.zeros(len(members), width, dtype=features.dtype, device=features.device, requires_grad=True)
        with torch.enable_grad():
            total = record.adapter.score_from(tap, inputs, targets, shift, record.outputs, rule).sum()
        [gradient] = _gradients(total, [shift], last=True)
        _finite(gradient, f"gradient at {tap}")
        yield Chunk(columns, record.of(members, shifts={tap: gradient}), members, scores.detach())


def one_per_picture(image: Sequence[int]) -> list[list[int]]:
    """Target indices in groups that have each picture at most once: the j-th group has every picture's j-th target."""
    groups: list[list[int]] = []
    seen: dict[int, int] = defaultdict(int)
    for k, b in enumerate(image):
        if seen[b] == len(groups):
            groups.append([])
        groups[seen[b]].append(k)
        seen[b] += 1
    return groups


def _gradients(score: Tensor, leaves: Sequence[Tensor], *, last: bool) -> list[Tensor]:
    """d score / d leaves; zero where the score does not depend on a leaf."""
    if not leaves:
        return []
    if not score.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(score, leaves, retain_graph=not last, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def _finite(tensor: Tensor, what: str) -> None:
    # A sum is finite only if every term is: one pass without a mask. It may overflow by itself, so look again.
    if not torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericError(
                f"{bad} of {tensor.numel()} {what} are NaN or Inf: the model's numbers cannot be explained"
            )
