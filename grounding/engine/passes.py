"""Run forward and backward passes and record, for chunks of targets, the signals that methods read.

The vision stack runs once for everything that needs no gradient inside it; its features are cached for later texts.
Methods at a layer with a shortcut (`Adapter.shortcut`) need no graph through the model. All other cases use the general
path: one graph, one backward pass per group of targets whose gradients do not overlap. A backward rule needs a general
pass of its own, and so do scores of single blocks (`readout_pass`) and of masked images (`grounding.engine.masking`).
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grounding.adapter.base import Adapter, Features, Shortcut
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.recorder import Recorder
from grounding.core.errors import ModelError, NumericError
from grounding.engine.masking import masked_scores
from grounding.engine.plan import MethodCall, Plan
from grounding.engine.readouts import block_scores
from grounding.engine.verification import RecordedScore
from grounding.methods.trace import Trace, precise

# Numbers that a shortcut may hold at once, over all targets of a chunk; about 0.25 GB.
FAST_BUDGET = 60_000_000
# For a layer that is read through a LayerNorm alone, |<features, gradient>| is below this fraction of |features|
# |gradient|.
ORTHOGONAL = 1e-3


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


def finite(tensor: Tensor, what: str) -> None:
    """Raise NumericError if a tensor contains NaN or Inf."""
    # The sum is finite only if all terms are, and needs no mask. It may also overflow: then count.
    if not torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericError(
                f"{bad} of {tensor.numel()} {what} are NaN or Inf: the model's numbers cannot be explained"
            )


def encode(
    adapter: Adapter,
    images: ImageInputs,
    layers: Collection[str] = (),
    attention: Collection[str] = (),
) -> Features:
    """Return image features, off the graph, from a pass without gradients in which layer outputs and attention weights
    are recorded too.

    The vision stack runs unless the cache of the images contains all of them. Raises NumericError for NaN or Inf.
    """
    if not images.cache.has(layers, attention):
        with Recorder(adapter.model, dict.fromkeys(layers, False), dict.fromkeys(attention, False)) as recorder:
            features = adapter.encode_images(images)
            recorder.check()
        for path, weights in recorder.weights.items():
            finite(weights, f"attention weights of {path}")
        images.cache.put(features, recorder.outputs, recorder.weights)
    assert images.cache.features is not None
    return images.cache.features


def run_passes(adapter: Adapter, inputs: Inputs, targets: Targets, plan: Plan) -> Generator[TraceChunk, None, None]:
    """Run the model as often as the plan needs (mostly once) and yield every chunk of targets.

    The first chunk has a target of every image. Raises NumericError for NaN or Inf, LayerError, ModelError.
    """
    shortcut = plan.shortcut
    fast = [call for call in plan.calls if shortcut is not None and is_fast(shortcut, targets, call)]
    masked = [call for call in plan.calls if "rescoring" in call.method.needs]
    blocks = [call for call in plan.calls if plan.readout(call)]
    general = [call for call in plan.calls if call not in [*fast, *masked, *blocks]]
    for rule in dict.fromkeys([None, *(call.rule for call in general)]):
        slow = [call for call in general if call.rule == rule]
        if slow or (fast and rule is None):
            yield from _one_pass(adapter, inputs, targets, plan, slow, fast if rule is None else [], rule)
    for rule, readout in dict.fromkeys((call.rule, plan.readout(call)) for call in blocks):
        own = [call for call in blocks if (call.rule, plan.readout(call)) == (rule, readout)]
        yield from _block_pass(adapter, inputs, targets, plan, own, rule)
    if masked:
        yield from _masked_pass(adapter, inputs, targets, plan, masked)


def is_fast(shortcut: Shortcut, targets: Targets, call: MethodCall) -> bool:
    """Whether a method call needs only the pooled gradient at a layer with a shortcut."""
    needs = call.method.needs
    pooled_alone = "pooled_gradient" in needs and needs <= {"activations", "pooled_gradient"}
    alone = pooled_alone and targets.baseline_sequence is None
    return alone and len(call.paths) == 1 and call.paths[0] in shortcut.layers


def _one_pass(
    adapter: Adapter,
    inputs: Inputs,
    targets: Targets,
    plan: Plan,
    slow: Sequence[MethodCall],
    fast: Sequence[MethodCall],
    rule: str | None,
) -> Iterator[TraceChunk]:
    layers, attention = plan.signals(slow)
    starts = _starts(plan.shortcut, fast)
    own = _of_images(plan, {**starts, **layers}), _of_images(plan, attention)
    here = ({**starts, **layers}, attention)
    cached: Features | None = None
    seen: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = {}, {}
    if not any([*own[0].values(), *own[1].values()]):
        cached = encode(adapter, inputs.images, *own)
        seen = inputs.images.cache.outputs, inputs.images.cache.weights
        here = _without(here[0], own[0]), _without(here[1], own[1])
    verified = RecordedScore(adapter, inputs, targets, attention)
    with Recorder(adapter.model, *here, rule, plan.query_keys(slow)) as recorder:
        features = adapter.encode_images(inputs.images) if cached is None else cached
        scores = adapter.score(inputs, features, targets)
        recorder.check()
        if cached is None:
            inputs.images.cache.put(features)
        for path, weights in recorder.weights.items():
            finite(weights, f"attention weights of {path}")
        _check_scores(adapter, scores, targets)
        verified.check(scores)
        record = replace(
            _blank(adapter, inputs, targets, plan),
            outputs={**{path: seen[0][path] for path in own[0] if path in seen[0]}, **recorder.outputs},
            weights={**{path: seen[1][path] for path in own[1] if path in seen[1]}, **recorder.weights},
            query_keys=recorder.query_keys,
        )
        if slow:
            yield from _slow_chunks(record, slow, layers, attention, scores, rule)
    with Recorder(adapter.model):  # records nothing: parts of the model run again
        for layer, wanted_rule in dict.fromkeys((call.paths[0], call.rule) for call in fast):
            calls = tuple(c for c in fast if c.paths == (layer,) and c.rule == wanted_rule)
            assert plan.shortcut is not None
            yield from _fast_chunks(record, calls, plan.shortcut, scores)


def _check_scores(adapter: Adapter, scores: Tensor, targets: Targets) -> None:
    """Raises ModelError for another number of scores than targets, NumericError for NaN or Inf."""
    if scores.shape != (len(targets),):
        raise ModelError(
            f"{type(adapter).__name__}.score returned shape {tuple(scores.shape)}, expected ({len(targets)},): one "
            "score per target"
        )
    finite(scores, "scores")


def _blank(adapter: Adapter, inputs: Inputs, targets: Targets, plan: Plan) -> Trace:
    """A trace without signals."""
    return Trace(adapter, plan.structure, inputs, targets, frozenset(), {}, {}, {}, {}, {})


def _block_pass(
    adapter: Adapter,
    inputs: Inputs,
    targets: Targets,
    plan: Plan,
    calls: Sequence[MethodCall],
    rule: str | None,
) -> Iterator[TraceChunk]:
    """Gradients of the scores of single blocks, one backward pass per group of targets of different images."""
    found = block_scores(adapter, inputs, targets, plan, calls, rule)
    inputs.images.cache.put(found.features)
    with Recorder(adapter.model):
        scores = adapter.score(inputs, found.features, targets)
    _check_scores(adapter, scores, targets)
    finite(found.totals, "scores of single blocks")
    record = replace(_blank(adapter, inputs, targets, plan), weights=found.weights)
    groups = disjoint_groups([{b} for b in targets.image.tolist()])
    if not adapter.text_conditioned(targets.kind, gradient=True):
        groups = groups[:1]
    for number, members in enumerate(groups):
        total = found.totals[members].sum()
        gradients = _gradients(total, list(found.leaves.values()), last=number == len(groups) - 1)
        named = dict(zip(found.leaves, gradients, strict=True))
        for path, gradient in named.items():
            finite(gradient, f"gradient at {path}")
        yield TraceChunk(tuple(calls), record.of(members, readouts=named), members, scores)


def _masked_pass(
    adapter: Adapter, inputs: Inputs, targets: Targets, plan: Plan, calls: Sequence[MethodCall]
) -> Iterator[TraceChunk]:
    """Scores of masked images, of all targets together; each method call has masks of its own."""
    features = encode(adapter, inputs.images)
    with Recorder(adapter.model):
        scores = adapter.score(inputs, features, targets)
    _check_scores(adapter, scores, targets)
    members = list(range(len(targets)))
    if not adapter.text_conditioned(targets.kind, gradient=True):
        members = disjoint_groups([{b} for b in targets.image.tolist()])[0]
    chosen = targets.select(members)
    for call in calls:
        assert call.method.masks is not None
        masks = [
            call.method.masks(call.options, inputs.images.geometry(b), plan.seed, precise(scores).dtype)
            for b in range(len(inputs.images))
        ]
        masked = masked_scores(adapter, inputs, features, chosen, masks)
        blank = _blank(adapter, inputs, chosen, plan)
        trace = replace(blank, masks=masks, whole=precise(scores[members]), masked=precise(masked))
        yield TraceChunk((call,), trace, members, scores)


def _starts(shortcut: Shortcut | None, fast: Sequence[MethodCall]) -> dict[str, bool]:
    """Modules whose outputs the shortcut starts from, none of them with a gradient."""
    if shortcut is None:
        return {}
    return {path: False for call in fast for layer in call.paths for path in (layer, *shortcut.layers[layer])}


def _of_images(plan: Plan, paths: Mapping[str, bool]) -> dict[str, bool]:
    return {path: gradient for path, gradient in paths.items() if plan.structure.items(path) == "image"}


def _without(paths: Mapping[str, bool], others: Mapping[str, bool]) -> dict[str, bool]:
    return {path: gradient for path, gradient in paths.items() if path not in others}


def look_ahead(adapter: Adapter, images: ImageInputs, plan: Plan) -> None:
    """Run the vision stack once and cache what the plan needs of it, before the model generates texts from it."""
    layers, attention = plan.signals(plan.calls)
    shortcut = {} if plan.shortcut is None else plan.shortcut.layers
    starts = {path: False for layer, others in shortcut.items() if layer in layers for path in (layer, *others)}
    own = (_of_images(plan, {**layers, **starts}), _of_images(plan, attention))
    # Signals with a gradient need a pass of their own later.
    encode(adapter, images, *([path for path, gradient in paths.items() if not gradient] for paths in own))


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
            gradients = [_with_own(own, i, g, record.targets.sequences) for i, g in enumerate(gradients)]
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
    return record.targets.baseline_sequence is not None and all(
        record.structure.items(path) == "sequence" for path in leaves
    )


def _with_own(own: dict[int, Tensor], leaf: int, gradient: Tensor, sequences: Tensor) -> Tensor:
    """The gradient with the rows of the targets' own sequences taken from the first backward pass, not summed over
    targets."""
    rows = sequences.unique().to(gradient.device)
    kept = own.setdefault(leaf, gradient[rows])
    return gradient.index_copy(0, rows, kept)


def _groups(record: Trace, leaves: Sequence[str]) -> list[list[int]]:
    """Groups of targets that can share a backward pass.

    At a leaf whose leading axis counts images a group has one target per image; at one that counts texts, one per text;
    in the last block of a text stack, one per position, as each depends on its own row alone. Without leaves, and with
    the text in the attention alone, all targets are one group.
    """
    structure, targets = record.structure, record.targets
    image, text = targets.image.tolist(), targets.sequences.tolist()
    last = {s.attention[-1] for s in structure.stacks.values() if s.rows_read_alone and s.attention}
    if any(structure.items(path) == "image" for path in leaves) or not structure.reads_sequence:
        claims = [{b} for b in image]
    elif not leaves:
        claims = [set() for _ in image]
    elif _shares_sequences(record, leaves):
        groups = disjoint_groups([{t} for t in text])
        return [groups[0], [k for group in groups[1:] for k in group]] if len(groups) > 1 else groups
    elif targets.read_rows is None or not last.issuperset(leaves):
        claims = [{t} for t in text]
    else:
        claims = [{(t, int(i)) for i in row.nonzero()} for t, row in zip(text, targets.read_rows, strict=True)]
    return disjoint_groups(claims)


def _orthogonal(chunk: Trace) -> frozenset[str]:
    """Layers where the gradient of every patch is orthogonal to its features, to rounding."""
    found = set()
    for path, gradient in chunk.gradients.items():
        both = (chunk.folded(path, precise(tensor)) for tensor in (chunk.outputs[path], gradient))
        if all(are_orthogonal(*pair) for pair in zip(*both, strict=True)):
            found.add(path)
    return frozenset(found)


def are_orthogonal(features: Tensor, gradient: Tensor) -> bool:
    """Whether <features, gradient> is negligible beside |features| |gradient|, summed over patches."""
    size = (features.norm(dim=-1) * gradient.norm(dim=-1)).sum()
    return bool(size > 0 and (features * gradient).sum(-1).abs().sum() < ORTHOGONAL * size)


def _orthogonal_fast(record: Trace, shortcut: Shortcut, layer: str) -> bool:
    """As `_orthogonal`, for a layer with a shortcut, for one target per image."""
    leaf = record.outputs[layer].detach().requires_grad_()
    with torch.enable_grad():
        features = shortcut.features(layer, leaf, record.inputs.images)
        if features is None:
            return False
        members = disjoint_groups([{b} for b in record.targets.image.tolist()])[0]
        total = record.adapter.score(record.inputs, features, record.targets.select(members)).sum()
    [gradient] = _gradients(total, [leaf], last=True)
    both = (record.folded(layer, precise(tensor)) for tensor in (leaf, gradient))
    return all(are_orthogonal(*pair) for pair in zip(*both, strict=True))


def _fast_chunks(
    record: Trace, calls: tuple[MethodCall, ...], shortcut: Shortcut, scores: Tensor
) -> Iterator[TraceChunk]:
    """All targets at once, or as many as fit in memory: the pooled gradient of each target at one layer."""
    [layer], rule = calls[0].paths, calls[0].rule
    output = record.outputs[layer].detach()
    size = max(1, FAST_BUDGET // max(1, output[0].numel() // 4))
    flat = rule is None and _orthogonal_fast(record, shortcut, layer)
    for first in range(0, len(record.targets), size):
        members = list(range(first, min(first + size, len(record.targets))))
        gradient = shortcut.pooled_gradient(layer, record.inputs, record.targets.select(members), record.outputs, rule)
        finite(gradient, f"gradient at {layer}")
        chunk = record.of(members, pooled_gradients={layer: gradient})
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
