"""One pass, all methods: `explain` is the way through the house; `tracing` is its middle."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grounding.adapter.base import Adapter, TokenProbability
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.recorder import random_state
from grounding.core.errors import GroundingError, LayerError, NumericError, OptionError
from grounding.core.text import Span
from grounding.engine.arguments import flatten, selections_of
from grounding.engine.passes import look, run_passes
from grounding.engine.plan import MethodCall, plan_methods
from grounding.engine.provenance import provenance_of
from grounding.engine.selection import Selection
from grounding.engine.warnings import ROUNDING, map_warnings, orthogonal_warnings, text_independent_warnings
from grounding.explanation.explanation import Entry, Explanation, MethodMaps
from grounding.explanation.maps import Status, diagnose

BATCH_SIZE = 8
SEED = 0


def explain(
    adapter: Adapter,
    images: Any,
    texts: Any = None,
    *,
    methods: Sequence[str] | None = None,
    select: Selection | Sequence[Any] | None = None,
    target: Any = None,
    token_target: str | None = None,
    layers: str | int | Sequence[str | int] = (),
    average_layers: bool = False,
    options: Mapping[str, Any] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
) -> Any:
    """Explain why the model connects pictures and texts.

    Parameters
    ----------
    adapter: a model and its processor, e.g. `adapters.load("openai/clip-vit-base-patch16")`.
    images: one picture (path, PIL image, array, file object, opened `Picture`) or a list of them; or pictures seen once
        (`adapter.prepare_images([...])`), whose pass is then reused for every later text.
    texts: for one picture a text or a list of texts; for a list of pictures one item of that kind per picture. A model
        that writes texts itself is made to write this one; None or `Generate(...)` in place of a text: its own. Of a
        model that knows classes: names of classes, each of which then gets an Explanation; better say them by `target`.
    methods: names in `grounding.METHODS`; default `adapter.default_methods`, as does the name "default".
    select: which entries of a caption are explained; default the caption and each token. One `Selection` for all texts,
        or lists of them, one list per picture with one per text.
    target: what is explained, one of `adapter.kinds`; of a model that knows classes, also one of them by name or index,
        or a list of them, which share an Explanation (default: the predicted one). `token_target`: how a part of a
        caption is scored, one of `adapter.token_targets`. Default the first of each.
    layers: the taps of methods that have one, as `Adapter.resolve` takes them; several give one column each, or with
        `average_layers` one joint column.
    options: "method.option" -> value, e.g. {"rollout.fusion": "max"}; likewise "target.option", where there are.
    batch_size: pictures per forward pass.

    Returns
    -------
    One Explanation for one picture and one text; lists give lists of the same nesting.

    Raises
    ------
    GroundingError (a ValueError, one line): unusable picture, text, layer, option or target; a dead layer; NaN or Inf.
    """
    if not isinstance(adapter, Adapter):
        raise GroundingError(
            f"explain needs an adapter, got {type(adapter).__name__}: adapters.load(id), or one around your model"
        )
    target, texts = adapter.asked_by(target, texts)
    adapter, options = aim(adapter, target, options)
    opened, captions, rebuild = flatten(images, texts, adapter.asked)
    if batch_size < 1:
        raise GroundingError(f"batch_size must be at least 1, got {batch_size}")
    plan = plan_methods(adapter, methods, layers, options, average_layers)
    selections = selections_of(select, captions)
    if any(s.where or s.contrast for own in selections for s in own) and not adapter.generates:
        raise OptionError(f"where and contrast ask what a model could have written; {adapter.info.type} writes no text")
    results: list[list[Explanation]] = []
    # The model's own precision, whatever the caller stands in: gradients of autocast are of mixed types.
    with (
        torch.inference_mode(False),
        torch.autocast(adapter.device.type, enabled=False),
        random_state(adapter.model, seed),
    ):
        for seen, part in _batches(adapter, images, opened, batch_size):
            if adapter.looks_first(captions[part]):
                look(adapter, seen, plan)
            chosen = [selection for own in selections[part] for selection in own]
            inputs = adapter.prepare_texts(seen, captions[part])
            results += _explain_batch(adapter, inputs, plan, chosen, target, token_target, seed)
    return rebuild(results)


def aim(adapter: Adapter, target: str | None, options: Mapping[str, Any] | None) -> tuple[Adapter, dict[str, Any]]:
    """The adapter for this kind of target with the options of targets, and the options of methods that are left."""
    settings = {key: value for key, value in (options or {}).items() if key.partition(".")[0] in adapter.kinds}
    rest = {key: value for key, value in (options or {}).items() if key not in settings}
    return adapter.aimed(target, settings), rest


def _batches(adapter: Adapter, images: Any, opened: list[Any], batch_size: int) -> Iterator[tuple[Inputs, slice]]:
    """Seen pictures and which they are, `batch_size` at a time; pictures that came seen stay together."""
    if isinstance(images, Inputs):
        yield images, slice(None)
        return
    for first in range(0, len(opened), batch_size):
        part = slice(first, first + batch_size)
        yield adapter.prepare_images(opened[part]), part


def _explain_batch(
    adapter: Adapter,
    inputs: Inputs,
    plan: Sequence[MethodCall],
    select: Sequence[Selection],
    target: str | None,
    token_target: str | None,
    seed: int,
) -> list[list[Explanation]]:
    """One list of explanations per picture of the batch."""
    spans = [one.spans(tokens) for one, tokens in zip(select, inputs.tokens, strict=True)]
    for tokens, chosen in zip(inputs.tokens, spans, strict=True):
        if not chosen:
            raise OptionError(f"nothing to explain in {tokens.text!r}: no caption, token, word or phrase was selected")
    targets = adapter.targets(inputs, spans, target, token_target)
    found = compute_maps(adapter, inputs, targets, plan)
    chances = adapter.alternatives(inputs, targets)
    provenance = provenance_of(adapter, seed)
    results: list[list[Explanation]] = [[] for _ in inputs.images]
    by_text: dict[int, list[int]] = defaultdict(list)
    for k, text in enumerate(targets.text.tolist()):
        by_text[text].append(k)
    for text, members in by_text.items():
        image = inputs.text_image[text]
        entries = tuple(entry_of(targets.spans[k], float(found.scores[k]), chances[k]) for k in members)
        made = {
            column.key: method_maps(
                adapter, column, targets, inputs, image, found.maps[column.key], members, found.orthogonal
            )
            for column in plan
        }
        own = (*inputs.warnings[image], *inputs.text_warnings[text])
        warnings = (
            *own,
            *orthogonal_warnings(plan, found.orthogonal),
            *text_independent_warnings(plan, entries),
            *map_warnings(made, entries),
        )
        results[image].append(
            Explanation(
                image=inputs.images[image],
                caption=inputs.tokens[text].text,
                entries=entries,
                methods=made,
                geometry=inputs.geometry[image],
                target=targets.kind,
                token_target=targets.token_target,
                model={"id": adapter.info.id, "type": adapter.info.type},
                warnings=warnings,
                provenance=provenance,
                origin=inputs.origins[text] if inputs.origins else "given",
                truncated=bool(inputs.tokens[text].dropped) or inputs.tokens[text].stopped,
            )
        )
    return results


@dataclass(frozen=True, eq=False)
class RawMaps:
    """Scores (K,) and, per column, raw maps: (K, rows, columns), or (B, rows, columns) where no text can enter.

    `orthogonal`: the taps whose gradient is at right angles to their features, to rounding.
    """

    scores: Tensor
    maps: dict[str, np.ndarray]
    orthogonal: frozenset[str]


def compute_maps(adapter: Adapter, inputs: Inputs, targets: Targets, plan: Sequence[MethodCall]) -> RawMaps:
    """Run the plan. Raises LayerError for a dead tap, NumericError for NaN or Inf."""
    static = [c for c in plan if not adapter.text_conditioned(targets.kind, c.method.reads_gradient)]
    made: dict[str, np.ndarray] = {}
    sizes: dict[str, float] = defaultdict(float)
    scores, orthogonal = torch.zeros(0), frozenset[str]()
    # Closed at once also after an error in a method: the model must be as before while the user reads the traceback.
    with contextlib.closing(run_passes(adapter, inputs, targets, plan)) as chunks:
        for chunk in chunks:
            scores, orthogonal = chunk.scores, orthogonal | chunk.orthogonal
            for column in chunk.columns:
                # No text can change a static one: the first chunk, which has a target of every picture, says it all.
                if column in static and column.key in made:
                    continue
                maps = column.maps(chunk.trace)
                count = len(inputs.images) if column in static else len(targets)
                places = chunk.trace.targets.image.tolist() if column in static else chunk.members
                made.setdefault(column.key, np.zeros((count, *maps.shape[1:]), np.float32))[places] = maps
            for path, size in chunk.trace.gradient_sizes().items():
                sizes[path] = max(sizes[path], size)
    _refuse_dead_layers(adapter, sizes)
    return RawMaps(scores, made, orthogonal)


def _refuse_dead_layers(adapter: Adapter, sizes: Mapping[str, float]) -> None:
    """A tap whose patches no score depends on gives blank maps: an error that names a live one."""
    for path, size in sizes.items():
        if size == 0:
            known = getattr(adapter, "live_tap", adapter.structure.layer)
            live = "" if path == known else f"use {known!r}, or "
            raise LayerError(
                f"layer {path!r} is dead: the score does not depend on its patch tokens (gradient exactly zero), its "
                f"maps would be blank; {live}see --list-layers for the live ones"
            )


def method_maps(
    adapter: Adapter,
    column: MethodCall,
    targets: Targets,
    inputs: Inputs,
    image: int,
    maps: np.ndarray,
    members: list[int],
    orthogonal: Collection[str] = (),
) -> MethodMaps:
    """What one text's entries (`members` of K) got from one column; `orthogonal` as in `RawMaps`.

    Raises NumericError where a method gave NaN.
    """
    conditioned = adapter.text_conditioned(targets.kind, column.method.reads_gradient)
    chosen = maps[members] if conditioned else maps[[image]]
    if not np.isfinite(chosen).all():
        raise NumericError(f"{column.method.title} gives NaN or Inf: the model's numbers cannot be explained")
    seen = inputs.geometry[image].of_map(*chosen.shape[1:]).seen_cells
    status = tuple(diagnose(raw, seen, signed=column.method.signed) for raw in chosen)
    if column.method.inner and column.method.rule is None and column.paths and set(column.paths) <= set(orthogonal):
        status = tuple(Status("degenerate", ROUNDING) for _ in chosen)
    return MethodMaps(
        column.key,
        column.name,
        column.method.title,
        column.layer,
        column.options,
        column.method.signed,
        conditioned,
        chosen,
        status,
    )


def entry_of(span: Span, score: float, chance: TokenProbability | None) -> Entry:
    """The entry of a scored span, with the probability of its token where it has one."""
    probability, others = chance or (None, ())
    return Entry(span.label, span.kind, span.start, span.end, score, span.token_id, probability, others)
