"""Looking inside Grad-CAM: the features of a layer, their gradients, the channel weights, and the map before the ReLU.

The same pass as `explain` makes, with nothing thrown away: the user's model is left exactly as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Inputs
from grounding.adapter.recorder import random_state
from grounding.core.errors import GroundingError, OptionError
from grounding.core.text import find_label
from grounding.engine.arguments import flatten
from grounding.engine.explain import SEED, aim, compute_maps, entry_of
from grounding.engine.passes import look
from grounding.engine.plan import DEFAULT, MethodCall, plan_methods
from grounding.engine.selection import Selection
from grounding.engine.warnings import orthogonal_warnings
from grounding.explanation.inspection import Inspection
from grounding.methods import METHODS
from grounding.methods.base import Method
from grounding.methods.trace import Trace

if TYPE_CHECKING:
    pass

# What a map is made of where every channel has one weight.
WEIGHTED = frozenset({"activations", "shift"})


@dataclass(frozen=True)
class _Recording(MethodCall):
    """A column that keeps everything: features, gradients and the map, side by side along the last axis."""

    def maps(self, trace: Trace) -> Float[np.ndarray, "k rows columns channels"]:
        seen = trace.at(self.paths[0], self.method.needs)
        both = (False, True) if seen.compares else (False,)
        features = [seen.activations(other=other) for other in both]
        gradients = [seen.patch_gradient(other=other) for other in both]
        options = {k: v for k, v in self.options.items() if k in self.method.own_options}
        return torch.cat([*features, *gradients, self.method(seen, **options)[..., None]], -1).cpu().numpy()


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
    """What Grad-CAM is made of, for one picture, one entry of one text, at one layer.

    `entry` is an index or a label among those that `select` chooses (0: the first, mostly the caption); `method` is one
    that weighs channels: gradcam or gradcam_ln. All else as in `grounding.explain`. Raises as `explain` does.
    """
    layers = [] if layer is None else [layer]
    return inspect_all(
        adapter,
        image,
        text,
        entry=entry,
        methods=[method],
        layers=layers,
        select=select,
        target=target,
        token_target=token_target,
        options=options,
        seed=seed,
    )[0]


def inspect_all(
    adapter: Adapter,
    image: Any,
    text: Any = None,
    *,
    entry: int | str | None = None,
    methods: Sequence[str] = ("gradcam",),
    layers: str | Sequence[str] = (),
    select: Selection | None = None,
    target: Any = None,
    token_target: str | None = None,
    options: Mapping[str, Any] | None = None,
    average_layers: bool = False,
    seed: int = SEED,
) -> list[Inspection]:
    """`inspect` for every chosen entry at every layer, entry by entry, from one pass; the keywords are those of
    `explain`. The methods that weigh channels are taken, or Grad-CAM where there is none among several.
    """
    del average_layers  # features of different layers have no mean
    target, text = adapter.asked_by(target, text)
    adapter, options = aim(adapter, target, options)
    images, texts, _ = flatten(image, text, adapter.asked)
    if len(images) != 1 or len(texts[0]) != 1:
        raise GroundingError(f"inspect looks at one picture and one text, got {len(images)} and {len(texts[0])}")
    names = _weighing(methods)
    own = {key: value for key, value in options.items() if key.partition(".")[0] in names}
    plan = [_recording(column) for column in plan_methods(adapter, names, layers, own)]
    with (
        torch.inference_mode(False),
        torch.autocast(adapter.device.type, enabled=False),
        random_state(adapter.model, seed),
    ):
        seen = image if isinstance(image, Inputs) else adapter.prepare_images(images)
        if adapter.looks_first(texts):
            look(adapter, seen, plan)
        return _inspected(
            adapter, adapter.prepare_texts(seen, texts), plan, select or Selection(), entry, target, token_target
        )


def _weighing(methods: Sequence[str]) -> list[str]:
    """Those of the methods that weigh channels; of several without one, the plain one. Raises OptionError,
    UnknownNameError."""
    asked = [methods] if isinstance(methods, str) else list(methods)
    names = [name for name in asked if name != DEFAULT and METHODS[name].needs == WEIGHTED]
    if not names and len(asked) == 1 and asked[0] != DEFAULT:
        known = [name for name in METHODS if METHODS[name].needs == WEIGHTED]
        raise OptionError(f"{asked[0]!r} has no channel weights to inspect (methods that have: {', '.join(known)})")
    return names or ["gradcam"]


def _recording(column: MethodCall) -> _Recording:
    needs = column.method.needs | {"patch_gradient"}
    method: Method = replace(column.method, needs=needs)
    return _Recording(column.key, column.name, method, column.options, column.layer, column.paths)


def _inspected(
    adapter: Adapter,
    inputs: Inputs,
    plan: Sequence[_Recording],
    select: Selection,
    entry: int | str | None,
    target: str | None,
    token_target: str | None,
) -> list[Inspection]:
    [tokens] = inputs.tokens
    spans = select.spans(tokens)
    if not spans:
        raise OptionError(f"nothing to inspect in {tokens.text!r}: no caption, token, word or phrase was selected")
    if entry is not None:
        spans = (spans[find_label(entry, [span.label for span in spans])],)
    targets = adapter.targets(inputs, [spans], target, token_target)
    found = compute_maps(adapter, inputs, targets, plan)
    chances = adapter.alternatives(inputs, targets)
    said = (*inputs.warnings[0], *inputs.text_warnings[0], *orthogonal_warnings(plan, found.orthogonal))
    made = []
    for k, span in enumerate(targets.spans):
        for column in plan:
            kept = found.maps[column.key]
            # Where no text can enter, all entries share what the picture has.
            own = kept[k if adapter.text_conditioned(targets.kind, column.method.reads_gradient) else 0]
            other = targets.other if adapter.structure.axis(column.paths[0]) == "text" else None
            compared = other is not None and int(other[k]) >= 0
            width = own.shape[-1] // 2
            # Of a caption that is compared with nothing, the second half is empty.
            shown = width if compared or other is None else width // 2
            features, gradients = own[..., :shown], own[..., width : width + shown]
            made.append(
                Inspection(
                    image=inputs.images[0],
                    caption=tokens.text,
                    entry=entry_of(span, float(found.scores[k]), chances[k]),
                    geometry=inputs.geometry[0].of_map(*own.shape[:2]),
                    layer=column.layer or "",
                    title=column.method.title,
                    features=features,
                    gradients=gradients,
                    weights=gradients.mean((0, 1)),
                    map=own[..., -1],
                    target=targets.kind,
                    model={"id": adapter.info.id, "type": adapter.info.type},
                    options=column.options,
                    compared=compared,
                    warnings=said,
                )
            )
    return made
