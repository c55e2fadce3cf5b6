"""One pass, all methods: `explain` is the way through the house, `trace` its middle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grounding.adapter import TOKEN_TARGETS, Adapter
from grounding.errors import GroundingError, LayerError, NumericError
from grounding.explanation import Explanation
from grounding.plan import Column, Selection, columns, wanted_signals
from grounding.recorder import Recorder
from grounding.results import doubts, entry_of, flatten, map_column, provenance_of
from grounding.trace import Trace
from grounding.types import Inputs, Targets

BATCH_SIZE = 8
SEED = 0


def explain(
    adapter: Adapter,
    images: Any,
    texts: Any,
    *,
    methods: Sequence[str] | None = None,
    select: Selection | None = None,
    target: str | None = None,
    token_target: str = TOKEN_TARGETS[0],
    layers: Sequence[str] = (),
    average_layers: bool = False,
    options: Mapping[str, Any] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
) -> Any:
    """Explain why the model connects pictures and texts.

    Parameters
    ----------
    adapter: a model and its processor, e.g. `adapters.load("openai/clip-vit-base-patch16")`.
    images: one picture (path, PIL image, array, file object, opened `Picture`) or a list of them.
    texts: for one picture a text or a list of texts; for a list of pictures one item of that kind per picture.
    methods: names in `grounding.METHODS`; default Grad-CAM, rollout, relevance.
    select: which entries of a caption are explained; default the caption and each token.
    target: what is explained, one of `adapter.kinds`; `token_target`: how a part of a caption is scored.
    layers: the taps of methods that have one, as `Adapter.resolve` takes them; several give one column each, or with
        `average_layers` one joint column.
    options: "method.option" -> value, e.g. {"rollout.fusion": "max"}.
    batch_size: pictures per forward pass.

    Returns
    -------
    One Explanation for one picture and one text; lists give lists of the same nesting.

    Raises
    ------
    GroundingError (a ValueError, one line): unusable picture, text, layer, option or target; a dead layer; NaN or Inf.
    """
    pictures, captions, rebuild = flatten(images, texts)
    if batch_size < 1:
        raise GroundingError(f"batch_size must be at least 1, got {batch_size}")
    plan = columns(adapter, methods, layers, options, average_layers)
    select = select or Selection()
    results: list[list[Explanation]] = []
    for first in range(0, len(pictures), batch_size):
        part = slice(first, first + batch_size)
        with (
            torch.inference_mode(False),
            torch.random.fork_rng(devices=[adapter.device] if adapter.device.type == "cuda" else []),
        ):
            torch.manual_seed(seed)
            inputs = adapter.prepare(pictures[part], captions[part])
            results += _explain_batch(adapter, inputs, plan, select, target, token_target, seed)
    return rebuild(results)


def _explain_batch(
    adapter: Adapter,
    inputs: Inputs,
    plan: Sequence[Column],
    select: Selection,
    target: str | None,
    token_target: str,
    seed: int,
) -> list[list[Explanation]]:
    """One list of explanations per picture of the batch."""
    spans = [select.spans(tokens) for tokens in inputs.tokens]
    for tokens, chosen in zip(inputs.tokens, spans, strict=True):
        if not chosen:
            raise GroundingError(
                f"nothing to explain in {tokens.text!r}: no caption, token, word or phrase was selected"
            )
    targets = adapter.targets(inputs, spans, target, token_target)
    scores, maps = compute(adapter, inputs, targets, plan)
    provenance = provenance_of(adapter, seed)
    results: list[list[Explanation]] = [[] for _ in inputs.pictures]
    by_text: dict[int, list[int]] = defaultdict(list)
    for k, text in enumerate(targets.text.tolist()):
        by_text[text].append(k)
    for text, members in by_text.items():
        image = inputs.text_image[text]
        entries = tuple(entry_of(targets.spans[k], float(scores[k])) for k in members)
        made = {
            column.key: map_column(adapter, column, targets, inputs, image, maps[column.key], members)
            for column in plan
        }
        warnings = (*inputs.warnings[image], *inputs.text_warnings[text], *doubts(made, entries))
        results[image].append(
            Explanation(
                picture=inputs.pictures[image],
                caption=inputs.tokens[text].text,
                entries=entries,
                columns=made,
                geometry=inputs.geometry[image],
                target=targets.kind,
                token_target=targets.token_target,
                model={"id": adapter.info.id, "type": adapter.info.type},
                warnings=warnings,
                provenance=provenance,
            )
        )
    return results


def compute(
    adapter: Adapter, inputs: Inputs, targets: Targets, plan: Sequence[Column]
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Scores (K,) and, per column, raw maps: (K, rows, columns), or (B, rows, columns) where no text can enter."""
    static = [c for c in plan if not adapter.text_conditioned(targets.kind, c.method.reads_gradient)]
    grid = adapter.grid(inputs)
    made = {
        column.key: np.zeros(((len(inputs.pictures) if column in static else len(targets)), *grid), np.float32)
        for column in plan
    }
    gradient_norms: dict[str, float] = defaultdict(float)
    scores = torch.zeros(0)
    for chunk, members, found in trace(adapter, inputs, targets, plan):
        scores = found
        for column in plan:
            if column in static:
                _fill_static(made[column.key], column, chunk)
            else:
                made[column.key][members] = column.maps(chunk).cpu().numpy()
        for path, gradient in chunk.gradients.items():
            gradient_norms[path] = max(gradient_norms[path], _patch_gradient_size(adapter, gradient, grid))
    _refuse_dead_taps(adapter, gradient_norms)
    return scores, made


def trace(
    adapter: Adapter, inputs: Inputs, targets: Targets, plan: Sequence[Column]
) -> Iterator[tuple[Trace, list[int], Tensor]]:
    """One forward pass; then a chunk at a time (one target per picture, one backward): trace, members of K, all scores.

    Pictures do not influence each other, so one backward of a sum over pictures gives every picture its own gradient.
    Raises NumericError for NaN or Inf.
    """
    taps, attention = wanted_signals(adapter, plan)
    wanted_taps = [path for path, gradient in taps.items() if gradient]
    wanted_attention = [path for path, gradient in attention.items() if gradient]
    with Recorder(adapter.model, taps, attention) as recorder:
        scores = adapter.forward(inputs, targets)
        recorder.check()
        assert scores is not None
        _finite(scores, "scores")
        for path, weights in recorder.weights.items():
            _finite(weights, f"attention weights of {path}")
        leaves = [recorder.outputs[p] for p in wanted_taps] + [recorder.weights[p] for p in wanted_attention]
        groups = one_per_picture(targets.image.tolist())
        for number, members in enumerate(groups):
            gradients = _gradients(scores[members].sum(), leaves, last=number == len(groups) - 1)
            named = dict(zip([*wanted_taps, *wanted_attention], gradients, strict=True))
            for path, gradient in named.items():
                _finite(gradient, f"gradient at {path}")
            chunk = Trace(
                adapter=adapter,
                targets=targets.select(members),
                grid=adapter.grid(inputs),
                needs=frozenset(),
                outputs=recorder.outputs,
                gradients={p: named[p] for p in wanted_taps},
                weights={"vision": [recorder.weights[p] for p in attention]} if attention else {},
                weight_gradients={"vision": [named[p] for p in wanted_attention]} if wanted_attention else {},
            )
            yield chunk, members, scores.detach()


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
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise NumericError(f"{bad} of {tensor.numel()} {what} are NaN or Inf: the model's numbers cannot be explained")


def _patch_gradient_size(adapter: Adapter, gradient: Tensor, grid: tuple[int, int]) -> float:
    return float(adapter.to_grid(gradient, grid).abs().max())


def _refuse_dead_taps(adapter: Adapter, sizes: Mapping[str, float]) -> None:
    """A tap whose patches no score depends on gives blank maps: an error that names a live one."""
    for path, size in sizes.items():
        if size == 0:
            raise LayerError(
                f"layer {path!r} is dead: the score does not depend on its patch tokens (gradient exactly zero), its "
                f"maps would be blank; use {adapter.sites.tap!r}, or see --list-layers for the live ones"
            )


def _fill_static(maps: np.ndarray, column: Column, chunk: Trace) -> None:
    """A map that no text can change is computed once per picture, with the picture's first target."""
    maps[chunk.targets.image.tolist()] = column.maps(chunk).cpu().numpy()
