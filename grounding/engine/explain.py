"""Explain images and texts: run one forward pass per batch and compute all requested maps from it."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, TypeVar, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from grounding.adapter.base import Adapter, Generates, TokenProbability
from grounding.adapter.inputs import DETAIL, OVERVIEW, ImageInputs, Inputs, Targets
from grounding.adapter.recorder import random_state
from grounding.core.errors import GroundingError, LayerError, NumericError, OptionError
from grounding.core.geometry import Geometry
from grounding.core.images import Picture
from grounding.core.text import Generate, Span
from grounding.engine.arguments import flatten, selections_of
from grounding.engine.passes import encode, look_ahead, run_passes
from grounding.engine.plan import MethodCall, Plan, plan_methods
from grounding.engine.provenance import provenance_of
from grounding.engine.queries import check_query, needs_features, prepare_inputs, split_target
from grounding.engine.request import BATCH_SIZE, SEED, Request
from grounding.engine.selection import Selection
from grounding.engine.warnings import ROUNDING, map_warnings, orthogonal_warnings, text_independent_warnings
from grounding.explanation.explanation import Entry, Explanation, MethodMaps
from grounding.explanation.maps import Status, diagnose

R = TypeVar("R")
# Checks a request against an adapter and lists its method calls.
PlanMethods = Callable[[Adapter, Request], Plan]


class ExplainKeywords(TypedDict, total=False):
    """Keyword arguments of `explain`, for its overloads."""

    methods: str | Sequence[str] | None
    select: Selection | Sequence[Any] | None
    target: Any
    token_target: str | None
    layers: str | int | Sequence[str | int]
    average_layers: bool
    options: Mapping[str, Any] | None
    batch_size: int
    seed: int


@overload
def explain(
    adapter: Adapter,
    images: list[Any] | tuple[Any, ...],
    texts: Sequence[list[Any] | tuple[Any, ...]],
    **keywords: Unpack[ExplainKeywords],
) -> list[list[Explanation]]: ...
@overload
def explain(
    adapter: Adapter,
    images: list[Any] | tuple[Any, ...],
    texts: Sequence[str | Generate | None] | None = None,
    **keywords: Unpack[ExplainKeywords],
) -> list[Explanation]: ...
@overload
def explain(
    adapter: Adapter,
    images: str | Picture | Any,
    texts: list[Any] | tuple[Any, ...],
    **keywords: Unpack[ExplainKeywords],
) -> list[Explanation]: ...
@overload
def explain(
    adapter: Adapter,
    images: str | Picture | Any,
    texts: str | Generate | None = None,
    **keywords: Unpack[ExplainKeywords],
) -> Explanation: ...
def explain(
    adapter: Adapter,
    images: Any,
    texts: Any = None,
    *,
    methods: str | Sequence[str] | None = None,
    select: Selection | Sequence[Any] | None = None,
    target: Any = None,
    token_target: str | None = None,
    layers: str | int | Sequence[str | int] = (),
    average_layers: bool = False,
    options: Mapping[str, Any] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
) -> Any:
    """Explain which parts of images a model connects with texts.

    Parameters
    ----------
    adapter: a model and its processor, e.g. `grounding.load("openai/clip-vit-base-patch16")`.
    images: one image (path, PIL image, array, file object, opened `Picture`) or a list of images; or images that were
        prepared once (`adapter.prepare_images([...])`), whose forward pass is reused for all later texts.
    texts: for one image a text or a list of texts; for a list of images one item of that kind per image. A model that
        generates text is forced to generate the given text; with None or `Generate(...)` it generates its own. A
        classifier takes names of classes, each of which gets an Explanation of its own; prefer `target` for them.
        For a target that no text can change (`norm`) it is None, and a text is not read.
    methods: names in `grounding.METHODS`; default `adapter.default_methods`, which the name "default" stands for.
    select: entries of a text that are explained; default the caption and each token. One `Selection` for all texts, or
        one list per image with a Selection per text.
    target: the scalar that is explained, one of `adapter.target_kinds`; for a classifier also a class by name or
        index, or a list of classes, which share one Explanation (default: the predicted class).
    token_target: how a part of a caption is scored, one of `adapter.token_targets`; default the first.
    layers: layers of the methods that are computed at one, as `ModelStructure.find_layer` takes them; several give one
        map each, or with `average_layers` one joint map.
    options: "method.option" -> value, e.g. {"rollout.fusion": "max"}; likewise "target.option" where there are any.
    batch_size: images per forward pass.
    seed: seed of torch's random state during the call; the caller's state is restored.

    Returns
    -------
    One Explanation for one image and one text; a list for one image with a list of texts, or for a list of images; a
    list of lists for a list of images with a list of texts each.

    Raises
    ------
    GroundingError (a ValueError, one line): unusable image, text, layer, option or target; a dead layer; NaN or Inf.

    Example
    -------
    >>> import grounding
    >>> model = grounding.load()  # the embedded demo model
    >>> explanation = grounding.explain(model, "photo.jpg", "man in red jacket")  # doctest: +SKIP
    >>> explanation["jacket"].peak  # (x, y) in original pixels  # doctest: +SKIP
    """
    one = select if isinstance(select, Selection) else Selection()
    listed = [layers] if isinstance(layers, int) else layers
    request = Request(methods, one, target, token_target, listed, average_layers, options or {}, seed)
    many = None if select is None or isinstance(select, Selection) else select
    return explain_request(adapter, images, texts, request, selections=many, batch_size=batch_size)


def explain_request(
    adapter: Adapter,
    images: Any,
    texts: Any,
    request: Request,
    *,
    selections: Sequence[Sequence[Selection]] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Any:
    """`explain` with its settings as a Request; `selections` override `request.select`, one list per image with one
    Selection per text. Raises as `explain`."""
    return run_request(adapter, images, texts, request, plan_methods, explanations, selections, batch_size)


@dataclass(frozen=True, eq=False)
class ComputedBatch:
    """A batch of images and texts with the raw maps of all targets, before they are assembled into results."""

    adapter: Adapter
    request: Request
    plan: Plan
    inputs: Inputs
    targets: Targets
    raw: RawMaps
    probabilities: Sequence[TokenProbability | None]

    @property
    def calls(self) -> Sequence[MethodCall]:
        """The method calls."""
        return self.plan.calls


def run_request(
    adapter: Adapter,
    images: Any,
    texts: Any,
    request: Request,
    plan: PlanMethods,
    assemble: Callable[[ComputedBatch], list[list[R]]],
    selections: Sequence[Sequence[Selection]] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Any:
    """Run a request batch by batch. `plan` lists its method calls, `assemble` makes the results of a batch: one list
    per image, one item per text. Returns them nested as `images` and `texts` are. Raises as `explain`."""
    if not isinstance(adapter, Adapter):
        raise GroundingError(
            f"explain needs an adapter, got {type(adapter).__name__}: adapters.load(id), or one around your model"
        )
    kind, texts = split_target(adapter, request.target, texts)
    request = replace(request, target=adapter.check_target(kind, request.token_target)[0])
    listed, queries, rebuild = flatten(images, texts, lambda value: check_query(adapter, value, str(request.target)))
    if batch_size < 1:
        raise GroundingError(f"batch_size must be at least 1, got {batch_size}")
    planned = plan(adapter, request)
    chosen = selections_of(request.select if selections is None else selections, queries)
    if any(s.where or s.contrast for own in chosen for s in own) and not isinstance(adapter, Generates):
        raise OptionError(
            f"where and contrast are about tokens that a model could generate; {adapter.info.type} generates no text"
        )
    results: list[list[R]] = []
    # The model's own precision, whatever context the caller is in: gradients of autocast are of mixed types.
    with (
        torch.inference_mode(False),
        torch.autocast(adapter.device.type, enabled=False),
        random_state(adapter.model, request.seed),
    ):
        for prepared, part in _batches(adapter, images, listed, batch_size):
            if needs_features(adapter, queries[part]):
                look_ahead(adapter, prepared, planned)
            inputs = prepare_inputs(adapter, prepared, queries[part])
            own = [selection for per_image in chosen[part] for selection in per_image]
            results += assemble(_compute_batch(adapter, request, planned, inputs, own))
    return rebuild(results)


def _batches(adapter: Adapter, images: Any, listed: list[Any], batch_size: int) -> Iterator[tuple[ImageInputs, slice]]:
    """Prepared images and their places, `batch_size` at a time; images that came prepared stay together."""
    if isinstance(images, ImageInputs):
        yield images, slice(None)
        return
    for first in range(0, len(listed), batch_size):
        part = slice(first, first + batch_size)
        yield adapter.prepare_images(listed[part]), part


def _compute_batch(
    adapter: Adapter, request: Request, plan: Plan, inputs: Inputs, select: Sequence[Selection]
) -> ComputedBatch:
    spans = [one.spans(text) for one, text in zip(select, inputs.texts, strict=True)]
    for text, chosen in zip(inputs.texts, spans, strict=True):
        if not chosen:
            raise OptionError(f"nothing to explain in {text.text!r}: no caption, token, word or phrase was selected")
    targets = adapter.targets(inputs, spans, plan.kind, request.token_target)
    targets = replace(targets, options=plan.target_options)
    raw = compute_maps(adapter, inputs, targets, plan)
    probabilities = adapter.probabilities(inputs, encode(adapter, inputs.images), targets)
    return ComputedBatch(adapter, request, plan, inputs, targets, raw, probabilities)


def explanations(batch: ComputedBatch) -> list[list[Explanation]]:
    """One list of explanations per image of a batch, one per text."""
    inputs, targets, adapter = batch.inputs, batch.targets, batch.adapter
    provenance = provenance_of(adapter, batch.request.seed)
    results: list[list[Explanation]] = [[] for _ in inputs.images.images]
    by_text: dict[int, list[int]] = defaultdict(list)
    for k, text in enumerate(targets.text.tolist()):
        by_text[text].append(k)
    for text, members in by_text.items():
        image = inputs.text_image[text]
        entries = tuple(entry_of(targets.spans[k], float(batch.raw.scores[k]), batch.probabilities[k]) for k in members)
        made = {call.key: method_maps(batch, call, image, members) for call in batch.calls}
        warnings = (
            *inputs.images.warnings[image],
            *inputs.texts[text].warnings,
            *orthogonal_warnings(batch.calls, batch.raw.orthogonal),
            *text_independent_warnings(batch.calls, entries),
            *map_warnings(made, entries),
        )
        results[image].append(
            Explanation(
                image=inputs.images.images[image],
                caption=inputs.texts[text].text,
                entries=entries,
                methods=made,
                geometry=inputs.images.geometry(image),
                target=targets.kind,
                token_target=None if targets.kind in adapter.text_independent else targets.token_target,
                model={"id": adapter.info.id, "type": adapter.info.type},
                warnings=warnings,
                provenance=provenance,
                origin=inputs.texts[text].origin,
                truncated=bool(inputs.texts[text].dropped) or inputs.texts[text].stopped,
                overview=_geometry(inputs, image, OVERVIEW),
            )
        )
    return results


def method_maps(batch: ComputedBatch, call: MethodCall, image: int, members: list[int]) -> MethodMaps:
    """The maps of one text's entries (`members` of the K targets) by one method call.

    Raises NumericError where a method gave NaN.
    """
    method, raw = call.method, batch.raw
    conditioned = batch.adapter.text_conditioned(batch.targets.kind, method.reads_score)
    places = members if conditioned else [image]
    maps, status = _diagnosed(batch, call, raw.maps[call.key], places, batch.inputs.images.geometry(image))
    made = MethodMaps(
        call.key, call.name, method.title, call.layer, call.options, method.signed, conditioned, maps, status
    )
    geometry = _geometry(batch.inputs, image, OVERVIEW)
    if geometry is None:
        return made
    overview, overview_status = _diagnosed(batch, call, raw.overviews[call.key], places, geometry)
    return replace(made, overview=overview, overview_status=overview_status)


def _geometry(inputs: Inputs, image: int, view: str) -> Geometry | None:
    """The geometry of a view of an image, None if it has no such view."""
    return None if inputs.images.view(image, view) is None else inputs.images.geometry(image, view)


def _diagnosed(
    batch: ComputedBatch, call: MethodCall, maps: Sequence[Any], places: Sequence[int], geometry: Geometry
) -> tuple[np.ndarray, tuple[Status, ...]]:
    """The maps at `places` of one view, and whether each is evidence. Raises NumericError for NaN."""
    method, chosen = call.method, np.stack([maps[k] for k in places])
    if not np.isfinite(chosen).all():
        raise NumericError(f"{method.title} gives NaN or Inf: the model's numbers cannot be explained")
    if method.inner and call.rule is None and call.paths and set(call.paths) <= set(batch.raw.orthogonal):
        return chosen, tuple(Status("degenerate", ROUNDING) for _ in chosen)
    seen = geometry.of_map(*chosen.shape[1:]).seen_cells
    return chosen, tuple(diagnose(raw, seen, signed=method.signed) for raw in chosen)


def entry_of(span: Span, score: float, probability: TokenProbability | None) -> Entry:
    """The entry of a scored span, with the probability of its token where it has one."""
    own, others = probability or (None, ())
    return Entry(span.label, span.kind, span.start, span.end, score, span.token_id, own, others)


@dataclass(frozen=True, eq=False)
class RawMaps:
    """Scores (K,) and, per method call, raw maps (rows, columns): one per target, or one per image where no text can
    enter.

    `overviews` are those of the `overview` view, None where an image has none. `orthogonal`: the layers whose gradient
    is orthogonal to their features, to rounding.
    """

    scores: Tensor
    maps: dict[str, list[np.ndarray]]
    overviews: dict[str, list[np.ndarray | None]]
    orthogonal: frozenset[str]


def compute_maps(adapter: Adapter, inputs: Inputs, targets: Targets, plan: Plan) -> RawMaps:
    """Compute the raw maps of all targets. Raises LayerError for a dead layer, NumericError for NaN or Inf."""
    static = [c for c in plan.calls if not adapter.text_conditioned(targets.kind, c.method.reads_score)]
    views = [name for name in (DETAIL, OVERVIEW) if any(view.name == name for view in inputs.images.views)]
    made: dict[tuple[str, str], list[Any]] = {}
    sizes: dict[str, float] = defaultdict(float)
    scores, orthogonal = torch.zeros(0), frozenset[str]()
    # Closed at once also after an error in a method: the model must be unchanged while the user reads the traceback.
    with contextlib.closing(run_passes(adapter, inputs, targets, plan)) as chunks:
        for chunk in chunks:
            scores, orthogonal = chunk.scores, orthogonal | chunk.orthogonal
            for call, view in ((call, view) for call in chunk.calls for view in views):
                # No text can change a static map: the first chunk, which has a target of every image, is enough.
                if call in static and (call.key, view) in made:
                    continue
                count = len(inputs.images) if call in static else len(targets)
                places = chunk.trace.targets.image.tolist() if call in static else chunk.members
                own = made.setdefault((call.key, view), [None] * count)
                for place, one in zip(places, call.maps(chunk.trace, view), strict=True):
                    own[place] = None if one is None else one.astype(np.float32)
            for path, size in chunk.trace.gradient_sizes().items():
                sizes[path] = max(sizes[path], size)
    _refuse_dead_layers(plan, sizes)
    maps = {key: own for (key, view), own in made.items() if view == DETAIL}
    overviews = {key: own for (key, view), own in made.items() if view == OVERVIEW}
    return RawMaps(scores, maps, overviews, orthogonal)


def _refuse_dead_layers(plan: Plan, sizes: Mapping[str, float]) -> None:
    """Raise LayerError, naming a live layer, for layers whose patches no score depends on."""
    for path, size in sizes.items():
        if size == 0:
            known = plan.structure.live_layer or plan.structure.default_layer
            live = "" if path == known else f"use {known!r}, or "
            raise LayerError(
                f"layer {path!r} is dead: the score does not depend on its patch tokens (gradient exactly zero), its "
                f"maps would be blank; {live}see --list-layers for the live ones"
            )
