"""Inspect what Grad-CAM is made of: features of a layer, gradients, channel weights, the map before the ReLU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import DETAIL, ImageInputs
from grounding.core.errors import GroundingError, OptionError
from grounding.core.text import Span, TokenizedText, find_label
from grounding.engine.explain import ComputedBatch, entry_of, run_request
from grounding.engine.plan import MethodCall, Plan, plan_methods
from grounding.engine.request import DEFAULT, SEED, Request
from grounding.engine.selection import Selection
from grounding.engine.warnings import orthogonal_warnings
from grounding.explanation.inspection import Inspection
from grounding.methods import METHODS
from grounding.methods.trace import Trace

# The signals of methods that give every channel one weight.
WEIGHTED = frozenset({"activations", "pooled_gradient"})


@dataclass(frozen=True)
class _Recording(MethodCall):
    """A method call that keeps features, gradients and the map, side by side along the last axis."""

    def maps(self, trace: Trace, view: str = DETAIL) -> list[Float[np.ndarray, "rows columns channels"] | None]:
        seen = trace.at(self.paths[0], self.method.needs, view)
        if not seen.by_grid():
            return [None] * len(trace.targets)
        both = (False, True) if seen.compares else (False,)
        features = [seen.activations(other=other) for other in both]
        gradients = [seen.patch_gradient(other=other) for other in both]
        options = {k: v for k, v in self.options.items() if k in self.method.own_options}
        return list(torch.cat([*features, *gradients, self.method(seen, **options)[..., None]], -1).cpu().numpy())


@dataclass(frozen=True)
class _OneEntry(Selection):
    """One of the entries that a selection chooses, by index or label."""

    chosen: Selection = field(default_factory=Selection)
    entry: int | str = 0

    def spans(self, tokens: TokenizedText) -> tuple[Span, ...]:
        spans = self.chosen.spans(tokens)
        return (spans[find_label(self.entry, [span.label for span in spans])],) if spans else ()


def inspect(
    adapter: Adapter,
    image: Any,
    text: Any = None,
    *,
    entry: int | str = 0,
    method: str = "gradcam",
    layer: str | None = None,
    select: Selection | None = None,
    target: Any = None,
    token_target: str | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = SEED,
) -> Inspection:
    """Inspect Grad-CAM for one image and one entry of one text, at one layer.

    `entry` is an index or a label among the entries that `select` chooses (0: the first, mostly the caption); `method`
    weights channels: gradcam or gradcam_ln. All other parameters are those of `grounding.explain`. Raises as `explain`.
    """
    layers = () if layer is None else (layer,)
    request = Request((method,), select or Selection(), target, token_target, layers, False, options or {}, seed)
    return inspect_request(adapter, image, text, request, entry=entry)[0]


def inspect_request(
    adapter: Adapter, image: Any, text: Any, request: Request, *, entry: int | str | None = None
) -> list[Inspection]:
    """Inspect every chosen entry (or the one named) at every layer, entry by entry, from one pass.

    Of the request's methods those count that weight channels; where several are requested and none does, Grad-CAM.
    Layers are never averaged: features of different layers have no mean. Raises as `explain`.
    """
    names = _weighing(request.methods or ("gradcam",))
    if entry is not None:
        request = replace(request, select=_OneEntry(chosen=request.select, entry=entry))

    def plan(adapter: Adapter, request: Request) -> Plan:
        kept = (*names, *adapter.target_kinds)
        own = {key: value for key, value in request.options.items() if key.partition(".")[0] in kept}
        planned = plan_methods(adapter, replace(request, methods=names, options=own, average_layers=False))
        return replace(planned, calls=tuple(_recording(call) for call in planned.calls))

    made: list[Inspection] = []

    def assemble(batch: ComputedBatch) -> list[list[list[Inspection]]]:
        own = [_inspection(batch, call, k) for k in range(len(batch.targets)) for call in batch.calls]
        made.extend(own)
        return [[own]]

    images = len(image.images) if isinstance(image, ImageInputs) else _count(image)
    if images != 1 or _count(text) != 1:
        raise GroundingError(f"inspect takes one image and one text, got {images} and {_count(text)}")
    run_request(adapter, image, text, request, plan, assemble)
    return made


def _count(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) else 1


def _weighing(methods: Sequence[str]) -> list[str]:
    """The methods that weight channels; where several are requested and none does, the plain one.

    Raises OptionError where a single method is requested that does not.
    """
    names = [name for name in methods if name != DEFAULT and METHODS[name].needs == WEIGHTED]
    if not names and len(methods) == 1 and methods[0] != DEFAULT:
        known = [name for name in METHODS if METHODS[name].needs == WEIGHTED]
        raise OptionError(f"{methods[0]!r} has no channel weights to inspect (methods that have: {', '.join(known)})")
    return names or ["gradcam"]


def _recording(call: MethodCall) -> _Recording:
    method = replace(call.method, needs=call.method.needs | {"patch_gradient"})
    return _Recording(call.key, call.name, method, call.options, call.layer, call.paths)


def _inspection(batch: ComputedBatch, call: MethodCall, k: int) -> Inspection:
    adapter, inputs, targets = batch.adapter, batch.inputs, batch.targets
    kept = batch.raw.maps[call.key]
    # Where no text can enter, all entries share what the image has.
    own = kept[k if adapter.text_conditioned(targets.kind, call.method.reads_score) else 0]
    on_sequences = batch.plan.structure.items(call.paths[0]) == "sequence"
    other = targets.baseline_sequence if on_sequences else None
    compared = other is not None and int(other[k]) >= 0
    width = own.shape[-1] // 2
    # Of a caption that is compared with nothing, the second half is empty.
    shown = width if compared or other is None else width // 2
    gradients = own[..., width : width + shown]
    return Inspection(
        image=inputs.images.images[0],
        caption=inputs.texts[0].text,
        entry=entry_of(targets.spans[k], float(batch.raw.scores[k]), batch.probabilities[k]),
        geometry=inputs.images.geometry(0).of_map(*own.shape[:2]),
        layer=call.layer or "",
        title=call.method.title,
        features=own[..., :shown],
        gradients=gradients,
        weights=gradients.mean((0, 1)),
        map=own[..., -1],
        target=targets.kind,
        model={"id": adapter.info.id, "type": adapter.info.type},
        options=call.options,
        compared=compared,
        warnings=(
            *inputs.images.warnings[0],
            *inputs.texts[0].warnings,
            *orthogonal_warnings(batch.calls, batch.raw.orthogonal),
        ),
    )
