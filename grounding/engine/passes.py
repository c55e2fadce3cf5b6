"""Run forward and backward passes and record, for chunks of targets, the signals that methods read.

The vision stack runs once for everything that needs no gradient inside it; its features are cached for later texts.
Methods at a layer with a fast path (`Adapter.fast_taps`) need no graph through the model: the scores are recomputed
from that layer on, with one vector per target added to all patches. All other cases use the general path: one graph,
one backward pass per group of targets whose gradients do not overlap. A backward rule needs a general pass of its own.
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
from grounding.core.errors import ModelError
from grounding.engine.plan import MethodCall, wanted_signals
from grounding.methods.trace import Trace, precise

# Numbers that the fast path may hold at once, over all targets of a chunk; about 0.25 GB.
FAST_BUDGET = 60_000_000
# For a layer that is read through a LayerNorm alone, |<features, gradient>| is below this fraction of |features|
# |gradient|.
ORTHOGONAL = 1e-3
# Stacks in whose last block each position depends on its own attention row alone.
READ_BY_ROWS = ("cross", "decoder", "fusion")


@dataclass(frozen=True, eq=False)
class TraceChunk:
    """A trace, the method calls that can be computed from it, and its targets (`members` of the K).

    `orthogonal` are the layers where the gradient of one target per image is orthogonal to the features.
    """

    calls: tuple[MethodCall, ...]
    trace: Trace
    members: list[int]
    scores: Tensor
    orthogonal: frozenset[str] = frozenset()


def run_passes(
    adapter: Adapter, inputs: Inputs, targets: Targets, plan: Sequence[MethodCall]
) -> Generator[TraceChunk, None, None]:
    """Run the model as often as the plan needs (mostly once) and yield every chunk of targets.

    The first chunk has a target of every image. Raises NumericError for NaN or Inf, LayerError, ModelError.
    """
    fast = [call for call in plan if is_fast(adapter, targets, call)]
    rules = dict.fromkeys(call.method.rule for call in plan if call not in fast)
    for rule in dict.fromkeys([None, *rules]):
        slow = [call for call in plan if call not in fast and call.method.rule == rule]
        if slow or (fast and rule is None):
            yield from _one_pass(adapter, inputs, targets, slow, fast if rule is None else [], rule)


def is_fast(adapter: Adapter, targets: Targets, call: MethodCall) -> bool:
    """Whether a method call needs only the pooled gradient at a layer with a fast path."""
    layers = adapter.fast_taps if targets.kind in adapter.fast_kinds else {}
    needs = call.method.needs
    shift_alone = "shift" in needs and needs <= {"activations", "shift"} and targets.other is None
    return shift_alone and len(call.paths) == 1 and call.paths[0] in layers


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
        if scores.shape != (len(targets),):
            raise ModelError(
                f"{type(adapter).__name__}.score returned shape {tuple(scores.shape)}, expected ({len(targets)},): one "
                "score per target"
            )
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
    with Recorder(adapter.model):  # records nothing: parts of the model run again
        for layer, wanted_rule in dict.fromkeys((call.paths[0], call.method.rule) for call in fast):
            calls = tuple(c for c in fast if c.paths == (layer,) and c.method.rule == wanted_rule)
            yield from _fast_chunks(record, calls, inputs, scores)


def _starts(adapter: Adapter, fast: Sequence[MethodCall]) -> dict[str, bool]:
    """Modules whose outputs the fast path starts from, none of them with a gradient."""
    return {path: False for call in fast for layer in call.paths for path in (layer, *adapter.fast_taps[layer])}


def _of_images(adapter: Adapter, paths: Mapping[str, bool]) -> dict[str, bool]:
    return {path: gradient for path, gradient in paths.items() if adapter.structure.axis(path) == "image"}


def _without(paths: Mapping[str, bool], others: Mapping[str, bool]) -> dict[str, bool]:
    return {path: gradient for path, gradient in paths.items() if path not in others}


def look(adapter: Adapter, inputs: Inputs, plan: Sequence[MethodCall]) -> None:
    """Run the vision stack once and cache what the plan needs of it, before the model generates texts from it."""
    layers, attention = wanted_signals(adapter, plan)
    starts = {
        path: False for layer, others in adapter.fast_taps.items() if layer in layers for path in (layer, *others)
    }
    own = (_of_images(adapter, {**layers, **starts}), _of_images(adapter, attention))
    # Signals with a gradient need a pass of their own later.
    remembered(adapter, inputs, *({path: False for path, gradient in paths.items() if not gradient} for paths in own))


def _slow_chunks(
    record: Trace,
    calls: Sequence[MethodCall],
    layers: Mapping[str, bool],
    attention: Mapping[str, bool],
    scores: Tensor,
    rule: str | None,
) -> Iterator[TraceChunk]:
    """One backward pass per group of targets whose gradients do not overlap: their sum's gradient holds each."""
    wanted_layers = [path for path, gradient in layers.items() if gradient]
    wanted_attention = [path for path, gradient in attention.items() if gradient]
    leaves = [record.outputs[p] for p in wanted_layers] + [record.weights[p] for p in wanted_attention]
    groups = _groups(record, [*wanted_layers, *wanted_attention])
    if not record.adapter.text_conditioned(record.targets.kind, gradient=bool(leaves)):
        groups = groups[:1]  # nothing depends on the target: one per image is enough
    own: dict[int, Tensor] = {}
    for number, members in enumerate(groups):
        gradients = _gradients(scores[members].sum(), leaves, last=number == len(groups) - 1)
        if _shares_sequences(record, [*wanted_layers, *wanted_attention]):
            gradients = [_with_own(own, i, g, record.targets.units) for i, g in enumerate(gradients)]
        named = dict(zip([*wanted_layers, *wanted_attention], gradients, strict=True))
        for path, gradient in named.items():
            finite(gradient, f"gradient at {path}")
        chunk = record.of(
            members,
            gradients={path: named[path] for path in wanted_layers},
            weight_gradients={path: named[path] for path in wanted_attention},
        )
        flat = _orthogonal(chunk) if number == 0 and rule is None else frozenset()
        yield TraceChunk(tuple(calls), chunk, members, scores.detach(), flat)


def _shares_sequences(record: Trace, leaves: Sequence[str]) -> bool:
    """Whether targets are differences of the scores of two sequences, at leaves whose leading axis counts sequences.

    All targets of a sequence then share one gradient there, and the sequences they are compared with belong to one
    target each.
    """
    return record.targets.other is not None and all(record.adapter.structure.axis(path) == "text" for path in leaves)


def _with_own(own: dict[int, Tensor], leaf: int, gradient: Tensor, units: Tensor) -> Tensor:
    """The gradient with the rows of the targets' own sequences taken from the first backward pass, not summed over
    targets."""
    rows = units.unique().to(gradient.device)
    kept = own.setdefault(leaf, gradient[rows])
    return gradient.index_copy(0, rows, kept)


def _groups(record: Trace, leaves: Sequence[str]) -> list[list[int]]:
    """Groups of targets that can share a backward pass.

    At a leaf whose leading axis counts images a group has one target per image; at one that counts texts, one per text;
    in the last block of a text stack, one per position, as each depends on its own row alone. Without leaves, and with
    the text in the attention alone, all targets are one group.
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
    """Layers where the gradient of every patch is orthogonal to its features, to rounding."""
    found = set()
    for path, gradient in chunk.gradients.items():
        grid = [chunk.adapter.to_grid(precise(t), chunk.grid, path) for t in (chunk.outputs[path], gradient)]
        if are_orthogonal(*grid):
            found.add(path)
    return frozenset(found)


def are_orthogonal(features: Tensor, gradient: Tensor) -> bool:
    """Whether <features, gradient> is negligible beside |features| |gradient|, summed over patches."""
    size = (features.norm(dim=-1) * gradient.norm(dim=-1)).sum()
    return bool(size > 0 and (features * gradient).sum(-1).abs().sum() < ORTHOGONAL * size)


def _orthogonal_fast(record: Trace, inputs: Inputs, layer: str) -> bool:
    """As `_orthogonal`, for a layer on the fast path, for one target per image."""
    leaf = record.outputs[layer].detach().requires_grad_()
    with torch.enable_grad():
        encoded = record.adapter.from_tap(layer, leaf)
        if encoded is None:
            return False
        members = disjoint_groups([{b} for b in record.targets.image.tolist()])[0]
        total = record.adapter.score(inputs, encoded, record.targets.select(members)).sum()
    [gradient] = _gradients(total, [leaf], last=True)
    return are_orthogonal(*(record.adapter.to_grid(precise(t), record.grid, layer) for t in (leaf, gradient)))


def _fast_chunks(record: Trace, calls: tuple[MethodCall, ...], inputs: Inputs, scores: Tensor) -> Iterator[TraceChunk]:
    """All targets at once, or as many as fit in memory: the pooled gradient of each target at one layer."""
    [layer], rule = calls[0].paths, calls[0].method.rule
    features = record.outputs[layer].detach()
    size = max(1, FAST_BUDGET // max(1, features[0].numel() // 4))
    flat = rule is None and _orthogonal_fast(record, inputs, layer)
    for first in range(0, len(record.targets), size):
        members = list(range(first, min(first + size, len(record.targets))))
        gradient = record.adapter.shifts(layer, inputs, record.targets.select(members), record.outputs, rule)
        finite(gradient, f"gradient at {layer}")
        chunk = record.of(members, shifts={layer: gradient})
        yield TraceChunk(calls, chunk, members, scores.detach(), frozenset([layer]) if flat else frozenset())


def disjoint_groups(claims: Sequence[Collection[Hashable]]) -> list[list[int]]:
    """Indices in groups without overlapping claims; each index joins the first group where it fits."""
    groups: list[list[int]] = []
    taken: list[set[Hashable]] = []
    for k, claim in enumerate(claims):
        place = next((i for i, claimed in enumerate(taken) if claimed.isdisjoint(claim)), len(groups))
        if place == len(groups):
            groups.append([])
            taken.append(set())
        groups[place].append(k)
        taken[place].update(claim)
    return groups


def _gradients(score: Tensor, leaves: Sequence[Tensor], *, last: bool) -> list[Tensor]:
    """d score / d leaves; zero where the score does not depend on a leaf."""
    if not leaves:
        return []
    if not score.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(score, leaves, retain_graph=not last, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
