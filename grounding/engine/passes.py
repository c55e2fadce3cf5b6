"""The middle of the engine: forward passes, and chunks of targets with the signals their methods need.

The vision stack runs once for all that needs no gradient inside it, and is remembered for later texts. A method at a
fast tap (`Adapter.fast_taps`) needs no graph through the model: the scores are recomputed from the tap onwards with one
shift vector per target. Everything else takes the slow, right way: one graph, one backward per group of targets that do
not get into each other's way. A method with a backward rule gets a pass of its own on the slow way.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.recorder import Recorder
from grounding.adapter.vision_cache import ENCODED, finite, keep, remembered
from grounding.engine.plan import MethodCall, wanted_signals
from grounding.methods.trace import Trace, precise

# Numbers that the fast way may hold at once per target: rows of attention and hidden features; about 0.25 GB.
FAST_BUDGET = 60_000_000
# A layer that is read through a LayerNorm alone has |<features, gradient>| below this part of the product of lengths.
RIGHT_ANGLE = 1e-3
# Stacks of whose last block each row is read from its own attention row alone.
READ_BY_ROWS = ("cross", "decoder", "fusion")


@dataclass(frozen=True, eq=False)
class TraceChunk:
    """The columns that can be computed from a trace, and which of the K targets it is about.

    `orthogonal` are the taps at which the gradient of one target per picture is at right angles to the features.
    """

    columns: tuple[MethodCall, ...]
    trace: Trace
    members: list[int]
    scores: Tensor
    orthogonal: frozenset[str] = frozenset()


def run_passes(
    adapter: Adapter, inputs: Inputs, targets: Targets, plan: Sequence[MethodCall]
) -> Generator[TraceChunk, None, None]:
    """Run the model as often as the plan needs (mostly once) and yield every chunk of targets.

    The first chunk has a target of every picture. Raises NumericError for NaN or Inf, LayerError, ModelError.
    """
    fast = [column for column in plan if is_fast(adapter, targets, column)]
    rules = dict.fromkeys(column.method.rule for column in plan if column not in fast)
    for rule in dict.fromkeys([None, *rules]):
        slow = [column for column in plan if column not in fast and column.method.rule == rule]
        if slow or (fast and rule is None):
            yield from _one_pass(adapter, inputs, targets, slow, fast if rule is None else [], rule)


def is_fast(adapter: Adapter, targets: Targets, column: MethodCall) -> bool:
    """Whether a column needs no more than shifts at fast taps."""
    layers = adapter.fast_taps if targets.kind in adapter.fast_kinds else {}
    needs = column.method.needs
    shift_alone = "shift" in needs and needs <= {"activations", "shift"} and targets.other is None
    return shift_alone and len(column.paths) == 1 and column.paths[0] in layers


def _one_pass(
    adapter: Adapter,
    inputs: Inputs,
    targets: Targets,
    slow: Sequence[MethodCall],
    fast: Sequence[MethodCall],
    rule: str | None,
) -> Iterator[TraceChunk]:
    layers, attention = wanted_signals(adapter, slow)
    starts = _starts(adapter, fast)
    own = _of_images(adapter, {**starts, **layers}), _of_images(adapter, attention)
    here = ({**starts, **layers}, attention)
    seen: Mapping[str, Tensor] = {}
    if not any([*own[0].values(), *own[1].values()]):
        seen = remembered(adapter, inputs, *own)
        here = _without(here[0], own[0]), _without(here[1], own[1])
    with Recorder(adapter.model, *here, rule) as recorder:
        encoded = seen[ENCODED] if seen else adapter.encode_images(inputs)
        scores = adapter.score(inputs, encoded, targets)
        recorder.check()
        if not seen:
            keep(inputs, {ENCODED: encoded.detach()})
        for path, weights in recorder.weights.items():
            finite(weights, f"attention weights of {path}")
        finite(scores, "scores")
        record = Trace(
            adapter=adapter,
            targets=targets,
            grid=adapter.grid(inputs),
            needs=frozenset(),
            outputs={**{path: seen[path] for path in own[0] if path in seen}, **recorder.outputs},
            gradients={},
            shifts={},
            weights={**{path: seen[path] for path in own[1] if path in seen}, **recorder.weights},
            weight_gradients={},
        )
        if slow:
            yield from _slow_chunks(record, slow, layers, attention, scores, rule)
    with Recorder(adapter.model):  # without the taps: parts of the model run again
        for layer, wanted_rule in dict.fromkeys((column.paths[0], column.method.rule) for column in fast):
            columns = tuple(c for c in fast if c.paths == (layer,) and c.method.rule == wanted_rule)
            yield from _fast_chunks(record, columns, inputs, scores)


def _starts(adapter: Adapter, fast: Sequence[MethodCall]) -> dict[str, bool]:
    """What the fast columns start from, none of it with a gradient."""
    return {path: False for column in fast for layer in column.paths for path in (layer, *adapter.fast_taps[layer])}


def _of_images(adapter: Adapter, paths: Mapping[str, bool]) -> dict[str, bool]:
    return {path: gradient for path, gradient in paths.items() if adapter.structure.axis(path) == "image"}


def _without(paths: Mapping[str, bool], others: Mapping[str, bool]) -> dict[str, bool]:
    return {path: gradient for path, gradient in paths.items() if path not in others}


def look(adapter: Adapter, inputs: Inputs, plan: Sequence[MethodCall]) -> None:
    """Run the vision stack once and remember what a plan needs of it, before the model writes texts from it."""
    layers, attention = wanted_signals(adapter, plan)
    starts = {
        path: False for layer, others in adapter.fast_taps.items() if layer in layers for path in (layer, *others)
    }
    own = (_of_images(adapter, {**layers, **starts}), _of_images(adapter, attention))
    # What is wanted with a gradient needs a pass of its own later on.
    remembered(adapter, inputs, *({path: False for path, gradient in paths.items() if not gradient} for paths in own))


def _slow_chunks(
    record: Trace,
    columns: Sequence[MethodCall],
    layers: Mapping[str, bool],
    attention: Mapping[str, bool],
    scores: Tensor,
    rule: str | None,
) -> Iterator[TraceChunk]:
    """One backward per group of targets that do not get into each other's way: their sum gives each its gradient."""
    wanted_taps = [path for path, gradient in layers.items() if gradient]
    wanted_attention = [path for path, gradient in attention.items() if gradient]
    leaves = [record.outputs[p] for p in wanted_taps] + [record.weights[p] for p in wanted_attention]
    groups = _groups(record, [*wanted_taps, *wanted_attention])
    if not record.adapter.text_conditioned(record.targets.kind, gradient=bool(leaves)):
        groups = groups[:1]  # nothing depends on the target: one per picture says it all
    own: dict[int, Tensor] = {}
    for number, members in enumerate(groups):
        gradients = _gradients(scores[members].sum(), leaves, last=number == len(groups) - 1)
        if _shares_sequences(record, [*wanted_taps, *wanted_attention]):
            gradients = [_with_own(own, i, g, record.targets.units) for i, g in enumerate(gradients)]
        named = dict(zip([*wanted_taps, *wanted_attention], gradients, strict=True))
        for path, gradient in named.items():
            finite(gradient, f"gradient at {path}")
        chunk = record.of(
            members,
            gradients={path: named[path] for path in wanted_taps},
            weight_gradients={path: named[path] for path in wanted_attention},
        )
        flat = _orthogonal(chunk) if number == 0 and rule is None else frozenset()
        yield TraceChunk(tuple(columns), chunk, members, scores.detach(), flat)


def _shares_sequences(record: Trace, leaves: Sequence[str]) -> bool:
    """Whether targets are differences of what single sequences score, at leaves that have the sequences first: all
    targets of a sequence then have one gradient there, and those that it is compared with are theirs alone."""
    return record.targets.other is not None and all(record.adapter.structure.axis(path) == "text" for path in leaves)


def _with_own(own: dict[int, Tensor], leaf: int, gradient: Tensor, units: Tensor) -> Tensor:
    """A gradient in which the targets' own sequences have what the first backward gave them, not a sum over targets."""
    rows = units.unique().to(gradient.device)
    kept = own.setdefault(leaf, gradient[rows])
    return gradient.index_copy(0, rows, kept)


def _groups(record: Trace, leaves: Sequence[str]) -> list[list[int]]:
    """Targets that may share a backward. At a leaf with the pictures first each picture may have one of them, with
    the texts first each text; in the last block of a text stack each position, as it is read from its own row alone.

    Without leaves, and the text in the attention alone, all of them.
    """
    adapter, targets = record.adapter, record.targets
    image, text = targets.image.tolist(), targets.units.tolist()
    last = {s.attention[-1] for name, s in adapter.structure.stacks.items() if name in READ_BY_ROWS and s.attention}
    if any(adapter.structure.axis(path) == "image" for path in leaves) or not adapter.structure.text_stacks:
        claims = [{b} for b in image]
    elif not leaves:
        claims = [set() for _ in image]
    elif _shares_sequences(record, leaves):
        groups = disjoint_groups([{t} for t in text])
        return [groups[0], [k for group in groups[1:] for k in group]] if len(groups) > 1 else groups
    elif targets.rows is None or not last.issuperset(leaves):
        claims = [{t} for t in text]
    else:
        claims = [{(t, int(i)) for i in row.nonzero()} for t, row in zip(text, targets.rows, strict=True)]
    return disjoint_groups(claims)


def _orthogonal(chunk: Trace) -> frozenset[str]:
    """Taps whose every patch has a gradient at right angles to its features, to rounding."""
    found = set()
    for path, gradient in chunk.gradients.items():
        grid = [chunk.adapter.to_grid(precise(t), chunk.grid, path) for t in (chunk.outputs[path], gradient)]
        if at_right_angles(*grid):
            found.add(path)
    return frozenset(found)


def at_right_angles(features: Tensor, gradient: Tensor) -> bool:
    """Whether <features, gradient> is nothing beside |features| |gradient|, patch by patch."""
    size = (features.norm(dim=-1) * gradient.norm(dim=-1)).sum()
    return bool(size > 0 and (features * gradient).sum(-1).abs().sum() < RIGHT_ANGLE * size)


def _orthogonal_fast(record: Trace, inputs: Inputs, layer: str) -> bool:
    """As `_orthogonal`, for a fast tap that is read through a LayerNorm alone, on one target per picture."""
    leaf = record.outputs[layer].detach().requires_grad_()
    with torch.enable_grad():
        encoded = record.adapter.from_tap(layer, leaf)
        if encoded is None:
            return False
        members = disjoint_groups([{b} for b in record.targets.image.tolist()])[0]
        total = record.adapter.score(inputs, encoded, record.targets.select(members)).sum()
    [gradient] = _gradients(total, [leaf], last=True)
    return at_right_angles(*(record.adapter.to_grid(precise(t), record.grid, layer) for t in (leaf, gradient)))


def _fast_chunks(
    record: Trace, columns: tuple[MethodCall, ...], inputs: Inputs, scores: Tensor
) -> Iterator[TraceChunk]:
    """All targets at once, or as many as fit: gradients with respect to one shift vector per target, at one tap."""
    [layer], rule = columns[0].paths, columns[0].method.rule
    features = record.outputs[layer].detach()
    size = max(1, FAST_BUDGET // max(1, features[0].numel() // 4))
    flat = rule is None and _orthogonal_fast(record, inputs, layer)
    for first in range(0, len(record.targets), size):
        members = list(range(first, min(first + size, len(record.targets))))
        gradient = record.adapter.shifts(layer, inputs, record.targets.select(members), record.outputs, rule)
        finite(gradient, f"gradient at {layer}")
        chunk = record.of(members, shifts={layer: gradient})
        yield TraceChunk(columns, chunk, members, scores.detach(), frozenset([layer]) if flat else frozenset())


def disjoint_groups(claims: Sequence[Collection[Hashable]]) -> list[list[int]]:
    """Indices in groups in which nothing is claimed twice: the first group that has room takes each in turn."""
    groups: list[list[int]] = []
    taken: list[set[Hashable]] = []
    for k, claim in enumerate(claims):
        home = next((i for i, claimed in enumerate(taken) if claimed.isdisjoint(claim)), len(groups))
        if home == len(groups):
            groups.append([])
            taken.append(set())
        groups[home].append(k)
        taken[home].update(claim)
    return groups


def _gradients(score: Tensor, leaves: Sequence[Tensor], *, last: bool) -> list[Tensor]:
    """d score / d leaves; zero where the score does not depend on a leaf."""
    if not leaves:
        return []
    if not score.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(score, leaves, retain_graph=not last, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
