"""Check that an adapter meets the contract of `grounding.adapter.base`, by running it.

    from grounding.testing import check_adapter

    check_adapter(MyAdapter(model), [image, other], [["a red car", "two dogs"], ["a dog on a sofa"]])

Each check compares what the adapter computes with something computed in another way: a batch with single images, a
gradient with a difference quotient, a shortcut with the slow reference. All violated requirements are reported at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from grounding.adapter.base import TOKEN_TARGETS, Adapter, Classifies, Generates
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.patch_tokens import PatchTokens, fold, shifted
from grounding.adapter.recorder import Recorder, find_module
from grounding.adapter.replicate import one_image_per_target
from grounding.adapter.structure import ModelInfo, ModelStructure, Stack
from grounding.core.errors import GroundingError, LayerError, TargetError
from grounding.core.printable import escape, one_line
from grounding.core.text import Generate, Query, Span, TokenizedText, word_spans
from grounding.engine.explain import explain
from grounding.engine.passes import run_passes
from grounding.engine.plan import MethodCall, available, plan_of
from grounding.engine.queries import prepare, prepare_inputs
from grounding.engine.signals import attentions, pooled_gradient, scores
from grounding.methods import METHODS
from grounding.methods.base import Method

__all__ = ["CHECKS", "ContractError", "check_adapter"]

# Largest difference of two ways to compute the same numbers, relative to the largest number: by precision of the model.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3}
# The same of a gradient and a difference quotient, and the step of the quotient relative to the features.
SLOPES = {torch.float64: (1e-4, 1e-5), torch.float32: (5e-2, 5e-3)}
# Words of a text that is longer than any model reads.
LONG = 1500


class ContractError(AssertionError):
    """An adapter does not meet the contract: one line for each violated requirement."""


def check_adapter(
    adapter: Adapter,
    images: Sequence[Any],
    texts: Sequence[Any],
    *,
    kinds: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> None:
    """Run the adapter and raise ContractError with one line per requirement of the contract that it does not meet.

    Parameters
    ----------
    adapter: the adapter, with its model in float32 or, better, float64. Small random weights are enough.
    images: two or more images (anything that `open_image` accepts), preferably of different sizes.
    texts: for each image a text (for a classifier: a class) or a list of them; at least two different ones.
    kinds: kinds of targets to check; default all in `target_kinds` that `check_target` accepts for this model.
    checks: names in `CHECKS`; default all.
    tolerance: largest relative difference of two ways to compute the same; default 1e-6 in float64, 2e-3 in float32.

    Each check runs for each kind of target; a line reads "check (kind): requirement; expected ..., got ...". Raises
    GroundingError for arguments that nothing can be checked with.
    """
    listed = [list(own) if isinstance(own, list | tuple) else [own] for own in texts]
    others = [text for own in listed for text in own if text not in listed[0]]
    if len(images) < 2 or len(listed) != len(images) or len(listed[0]) + len(others) < 2 or not all(listed):
        raise GroundingError("check_adapter needs two or more images, texts for each, and two different texts")
    if len(listed[0]) == 1:
        listed[0] += others[:1]  # an image with several texts
    if adapter.dtype not in TOLERANCES:
        raise GroundingError(f"check_adapter needs a model in float32 or float64, got {adapter.dtype}")
    unknown = [name for name in checks or () if name not in CHECKS]
    if unknown:
        raise GroundingError(f"no check {unknown[0]!r} (there are: {', '.join(CHECKS)})")
    limit = TOLERANCES[adapter.dtype] if tolerance is None else tolerance
    lines: list[str] = []
    for kind in kinds or _kinds(adapter):
        case = Case(adapter, list(images), listed, kind, limit)
        for name in checks or CHECKS:
            try:
                CHECKS[name](case)
            except Violation as violation:
                lines.append(f"{name} ({kind}): {violation}")
            except Exception as error:  # noqa: BLE001  (whatever an adapter raises is a violation)
                lines.append(f"{name} ({kind}): {_requirement(name)}; expected no error, got {_of_error(error)}")
    if lines:
        raise ContractError("\n".join([f"{type(adapter).__name__} does not meet the adapter contract:", *lines]))


class Violation(Exception):  # noqa: N818
    """A requirement is violated."""


@dataclass(frozen=True, eq=False)
class Case:
    """What a check gets: an adapter, its images and texts, and a kind of target.

    `tolerance` is the largest relative difference of two ways to compute the same numbers.
    """

    adapter: Adapter
    images: list[Any]
    texts: list[list[Any]]
    kind: str
    tolerance: float

    @cached_property
    def structure(self) -> ModelStructure:
        """The structure for the kind of target."""
        return self.adapter.structure(self.kind)

    @cached_property
    def inputs(self) -> Inputs:
        """Inputs of all images and texts."""
        return self.prepare(self.images, self.texts)

    @cached_property
    def targets(self) -> Targets:
        """Targets for the whole of each text and each of its tokens."""
        return self.targets_of(self.inputs)

    @cached_property
    def scores(self) -> Tensor:
        """The scores (K,) of all targets."""
        return scores(self.adapter, self.inputs, self.targets)

    @cached_property
    def slow_gradient(self) -> Tensor:
        """The pooled gradient (K, D) at the default layer, by the slow reference."""
        return pooled_gradient(self.adapter, self.inputs, self.targets, self.structure.default_layer)

    def prepare(self, images: Sequence[Any], texts: Sequence[Sequence[Any]]) -> Inputs:
        """Return inputs for the kind of target."""
        return prepare(self.adapter, images, texts, self.kind)

    def targets_of(self, inputs: Inputs, token_target: str | None = None) -> Targets:
        """Return targets for the whole of each text and each of its tokens."""
        return self.adapter.targets(inputs, [spans_of(text) for text in inputs.texts], self.kind, token_target)

    @property
    def has_texts(self) -> bool:
        """Whether the kind of target is about texts (not classes, not images alone)."""
        return not isinstance(self.adapter, Classifies) and self.kind not in self.adapter.text_independent

    def equal(self, found: Tensor, expected: Tensor, requirement: str, limit: float | None = None) -> None:
        """Raise Violation unless two tensors are equal up to the tolerance."""
        _require(found.shape == expected.shape, requirement, f"shape {_size(expected)}", f"shape {_size(found)}")
        if not expected.numel():
            return
        size = float(expected.abs().max())
        error = float((found - expected).abs().max()) / (size or 1.0)
        limit = self.tolerance if limit is None else limit
        _require(error <= limit, requirement, f"a relative difference up to {limit:.0e}", f"{error:.1e}")


def spans_of(text: TokenizedText) -> tuple[Span, ...]:
    """Return the spans of a text that are checked: its classes, or the whole of it and each token."""
    return text.class_spans() or (text.caption(), *text.tokens())


# ---------------------------------------------------------------- checks, in the order of the contract


def members(case: Case) -> None:
    """`model`, `info` and the class attributes are what the contract says."""
    adapter = case.adapter
    known = set(adapter.target_kinds)
    options = {key.partition(".")[0] for key in adapter.target_options}
    for condition, what, expected, seen in (
        (isinstance(adapter.model, nn.Module), "model is a module", "nn.Module", type(adapter.model).__name__),
        (isinstance(adapter.info, ModelInfo), "info is a ModelInfo", "ModelInfo", type(adapter.info).__name__),
        (len(known) == len(adapter.target_kinds), "target_kinds are different", "no repetition", adapter.target_kinds),
        (known.issuperset(adapter.text_independent), "text_independent", "target_kinds", adapter.text_independent),
        (options <= known, "target_options are 'kind.option'", "kinds in target_kinds", sorted(options)),
        (
            set(adapter.token_targets) <= set(TOKEN_TARGETS),
            "token_targets",
            ", ".join(TOKEN_TARGETS),
            adapter.token_targets,
        ),
        (
            set(adapter.default_methods) <= set(METHODS),
            "default_methods",
            "names in METHODS",
            adapter.default_methods,
        ),
    ):
        _require(condition, what, expected, seen)
    with contextlib.suppress(TargetError):
        adapter.targets(case.inputs, [[text.caption()] for text in case.inputs.texts], "no such kind")
        raise Violation("targets refuses unknown kinds; expected TargetError, got no error")


def structure(case: Case) -> None:
    """All modules that `structure` names exist, and attention is described completely."""
    own, model = case.structure, case.adapter.model
    _require(isinstance(own, ModelStructure), "structure returns a ModelStructure", "one", type(own).__name__)
    # Parts in `sequence_side` may be missing in a model of the family.
    paths = [own.default_layer, *filter(None, [own.live_layer])]
    paths += [path for stack in own.stacks.values() for path in (*stack.blocks, *stack.inputs, *stack.attention)]
    paths += [hop.keys for hop in own.path if hop.keys]
    for path in paths:
        try:
            find_module(model, path)
        except LayerError as error:
            raise Violation(f"structure names modules of the model; expected {path!r}, got {error}") from None
    for name, stack in own.stacks.items():
        for part, found in (("inputs", stack.inputs), ("attention", stack.attention)):
            _require(
                len(found) in (0, len(stack.blocks)),
                f"stack {name!r} has as many {part} as blocks, or none",
                len(stack.blocks),
                len(found),
            )
    for hop in own.path:
        has = bool(own.stack(hop.stack).attention)
        _require(has, f"the path goes through attention that is recorded: stack {hop.stack!r}", "attention", "none")
    missing = not own.path or any(not stack.attention for stack in own.stacks.values() if stack.blocks)
    _require(not missing or bool(own.unrecorded), "unrecorded says why attention is missing", "a reason", "''")


def views(case: Case) -> None:
    """Each image has a view with its geometry, and its own rows in the tensors."""
    adapter, count = case.adapter, len(case.images)
    made = adapter.prepare_images(case.images)
    _require(isinstance(made, ImageInputs), "prepare_images returns ImageInputs", "ImageInputs", type(made).__name__)
    _require(len(made) == count, "prepare_images returns all images", count, len(made))
    _require(len(made.warnings) == count, "warnings has a tuple for each image", count, len(made.warnings))
    for view in made.views:
        image, own = made.images[view.image], view.geometry
        size, measured = (image.width, image.height), (own.width, own.height)
        _require(measured == size, "the geometry of a view is that of its image", f"size {size}", measured)
        _require(min(own.rows, own.columns) > 0, "a view has a patch grid", "rows x columns", (own.rows, own.columns))
    for name, tensor in made.tensors.items():
        rows = sum(made.packed[name]) if name in made.packed else count
        _require(len(tensor) == rows, f"the leading axis of {name!r} counts images (or packed rows)", rows, len(tensor))
        on = tensor.device
        _require(on == adapter.device, f"{name!r} is on the device of the model", adapter.device, on)


def patches(case: Case) -> None:
    """The default layer has the patch grid of each view, at positions that exist once."""
    inputs, path = case.inputs, case.structure.default_layer
    output = _recorded(case, [path])[path]
    places = case.adapter.patch_tokens(path, inputs, tuple(output.shape))
    on_text = case.structure.items(path) == "sequence"
    owners = [inputs.text_image[p.item] for p in places if p.item is not None] if on_text else None
    expected = (
        [v for b in inputs.text_image for v, view in enumerate(inputs.images.views) if view.image == b]
        if on_text
        else list(range(len(inputs.images.views)))
    )
    what = "patch_tokens has one item per view" + (" and text" if on_text else "")
    _require([place.view for place in places] == expected, what, expected, [place.view for place in places])
    if owners is not None:
        wrong = [inputs.images.views[place.view].image for place in places]
        _require(owners == wrong, "the item of a view is a text about its image", owners, wrong)
    for place in places:
        _check_place(place, inputs, output)
    fold(output, places[:1])


def _check_place(place: PatchTokens, inputs: Inputs, output: Tensor) -> None:
    geometry = inputs.images.views[place.view].geometry
    grid = (geometry.rows, geometry.columns)
    _require(place.grid == grid, "the default layer has the patch grid of the geometry", grid, place.grid)
    if place.index is None:
        return
    positions = place.positions
    tokens = output.shape[-2]
    _require(len(set(positions)) == len(positions), "each patch has a position of its own", "no repetition", positions)
    inside = min(positions) >= 0 and max(positions) < tokens
    _require(inside, "positions are on the token axis", f"0 to {tokens - 1}", f"{min(positions)} to {max(positions)}")


def spans(case: Case) -> None:
    """There is one target for each span, in order, and targets can be selected."""
    inputs, targets = case.inputs, case.targets
    expected = [(t, span) for t, text in enumerate(inputs.texts) for span in spans_of(text)]
    _require(len(targets) == len(expected), "one target for each span", len(expected), len(targets))
    _require(targets.flat == expected, "targets follow texts and their spans in order", expected, targets.flat)
    image = [inputs.text_image[t] for t, _ in expected]
    _require(
        targets.image.tolist() == image, "the image of a target is that of its text", image, targets.image.tolist()
    )
    _require(targets.kind == case.kind, "targets have the kind that was asked for", case.kind, targets.kind)
    for name, tensor in targets.data.items():
        _require(len(tensor) == len(targets), f"the leading axis of {name!r} counts targets", len(targets), len(tensor))
    for name in ("chain_start", "read_rows"):
        rows = getattr(targets, name)
        if rows is not None:
            case.equal(rows.sum(-1), torch.ones_like(rows[:, 0]), f"the rows of {name} sum to 1")
    backwards = list(range(len(targets)))[::-1]
    turned = scores(case.adapter, inputs, targets.select(backwards))
    case.equal(turned, case.scores[backwards], "the score of a target does not depend on the other targets")


def forward(case: Case) -> None:
    """`score` of the result of `encode_images` gives one finite score per target, which `explain` reports."""
    found = case.scores
    _require(found.shape == (len(case.targets),), "one score per target", (len(case.targets),), _size(found))
    _require(bool(torch.isfinite(found).all()), "scores are finite", "finite numbers", found.tolist())
    made = explain(case.adapter, case.images, case.texts, target=case.kind, methods=_a_method(case))
    reported = [entry.score for own in made for one in own for entry in one.entries]
    case.equal(found.new_tensor(reported), found, "explain reports the scores of the adapter")
    again = case.adapter.encode_images(case.inputs.images)
    with Recorder(case.adapter.model):
        once_more = case.adapter.score(case.inputs, again, case.targets)
    case.equal(once_more.detach(), found, "the same features give the same scores")


def gradients(case: Case) -> None:
    """The gradient at the default layer is that of the score, and not zero."""
    limit, step = SLOPES[case.adapter.dtype]
    gradient, path = case.slow_gradient, case.structure.default_layer
    live = bool((gradient.abs().amax(-1) > 0).all())
    _require(live, f"the score depends on the patches of the default layer {path!r}", "a gradient", "zero")
    features = _recorded(case, [path])[path]
    step *= max(float(features.square().mean().sqrt()), torch.finfo(features.dtype).tiny)
    direction = torch.randn(gradient.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction.to(gradient)
    up, down = (_moved_scores(case, path, sign * step * direction) for sign in (1, -1))
    requirement = "the gradient at the default layer equals a difference quotient of the score"
    case.equal(gradient @ direction, (up - down) / (2 * step), requirement, limit)


def images_independent(case: Case) -> None:
    """Scores and gradients of an image are the same in a batch and alone."""
    singles = []
    for image, own in zip(case.images, case.texts, strict=True):
        inputs = case.prepare([image], [own])
        singles.append(scores(case.adapter, inputs, case.targets_of(inputs)))
    case.equal(case.scores, torch.cat(singles), "images are independent: a batch has the scores of single images")
    found = _pooled(case)
    case.equal(found, case.slow_gradient, "images are independent: one backward pass gives each image's gradient")


def texts_independent(case: Case) -> None:
    """Scores of a text are the same with other texts and alone."""
    alone = []
    for image, own in zip(case.images, case.texts, strict=True):
        for text in own:
            inputs = case.prepare([image], [[text]])
            alone.append(scores(case.adapter, inputs, case.targets_of(inputs)))
    case.equal(case.scores, torch.cat(alone), "texts are independent: several texts have the scores of single texts")


def texts(case: Case) -> None:
    """Tokens are parts of the given text, and the part that is truncated is reported."""
    if not case.has_texts:
        return
    given = [text for own in case.texts for text in own]
    for text, found in zip(given, case.inputs.texts, strict=True):
        wanted = text.text if isinstance(text, Query) else text
        if isinstance(wanted, str):
            _require(found.text == wanted, "prepare_texts keeps the text as it is", repr(wanted), repr(found.text))
        _check_offsets(found)
    first = given[0].text if isinstance(given[0], Query) else given[0]
    if not isinstance(first, str):
        return
    start, end = word_spans(first)[0]
    long = " ".join([first[start:end]] * LONG)
    query = replace(given[0], text=long) if isinstance(given[0], Query) else Query(long)
    prepared = case.adapter.prepare_images(case.images[:1])
    [found] = prepare_inputs(case.adapter, prepared, [[query]]).texts
    _check_offsets(found)
    if found.dropped:
        _require(long.endswith(found.dropped), "dropped is the end of the text", "its last characters", "others")
        _require(bool(found.warnings), "a truncated text has a warning", "warnings", "none")


def _check_offsets(text: TokenizedText) -> None:
    count = len(text)
    same = len(text.offsets) == len(text.special) == count
    _require(same, "ids, offsets and special have one item per token", count, (len(text.offsets), len(text.special)))
    inside = all(0 <= a <= b <= len(text.text) for a, b in text.offsets)
    _require(inside, "offsets are spans of the text", f"0 to {len(text.text)}", text.offsets)
    last = max((text.offsets[i][1] for i in text.visible), default=0)
    words = [end for _, end in word_spans(text.text)]
    whole = bool(text.dropped) or not words or last >= words[-1]
    _require(whole, "every word is in a token, or in dropped", f"tokens up to {words[-1:]}", last)


def token_targets(case: Case) -> None:
    """`alone` scores a part as a text of its own; leave-one-out is another score of it."""
    kinds = case.adapter.token_targets
    if not case.has_texts or not kinds:
        return
    own = {name: _token_scores(case, name) for name in _supported(case, kinds)}
    whole = [k for k, span in enumerate(case.targets.spans) if span.kind == "caption"]
    parts = [k for k, span in enumerate(case.targets.spans) if span.kind == "token"]
    for found in own.values():
        case.equal(found[whole], case.scores[whole], "the score of a whole text is the same for all token_targets")
    if len(own) > 1 and len(parts) > 1:
        first, second = own.values()
        _require(not torch.equal(first[parts], second[parts]), "token_targets differ", "two scores", "the same")
    if "alone" in own:
        text = case.inputs.texts[0]
        word = text.words()[0]
        chosen = [[word] if t == 0 else [] for t in range(len(case.inputs.texts))]
        found = scores(case.adapter, case.inputs, case.adapter.targets(case.inputs, chosen, case.kind, "alone"))
        query = case.texts[0][0]
        short = replace(query, text=word.label) if isinstance(query, Query) else word.label
        inputs = case.prepare(case.images[:1], [[short]])
        caption = case.adapter.targets(inputs, [[inputs.texts[0].caption()]], case.kind)
        expected = scores(case.adapter, inputs, caption)
        case.equal(found, expected, "`alone` scores a part as a text of its own")


def text_independent(case: Case) -> None:
    """Kinds in `text_independent` need no text; all others depend on it."""
    whole = [k for k, span in enumerate(case.targets.spans) if span.kind in ("caption", "class", "image")]
    first = [k for k in whole if int(case.targets.image[k]) == 0]
    if case.kind in case.adapter.text_independent:
        kinds = {span.kind for span in case.targets.spans}
        _require(kinds == {"image"}, "a target without text has one entry of kind image", "image", sorted(kinds))
        case.equal(case.scores[first], case.scores[first[:1]].expand(len(first)), "no text changes the score")
    else:
        differ = case.texts[0][0] == case.texts[0][1] or len(set(case.scores[first].tolist())) > 1
        _require(differ, "the score depends on the text (or is in text_independent)", "different scores", "equal ones")


def attention(case: Case) -> None:
    """Recorded attention is what the model computes with: rows sum to 1 and the score depends on them."""
    adapter, own = case.adapter, case.structure
    for name, stack in own.stacks.items():
        if not stack.attention:
            continue
        found = attentions(adapter, case.inputs, name, case.kind)
        for path, weights in zip(stack.attention, found, strict=True):
            _require(weights.ndim == 4, f"weights of {path!r} are (B, H, Q, S)", "4 axes", weights.ndim)
            sums = weights.sum(-1)
            case.equal(sums, torch.ones_like(sums), f"rows of the attention of {path!r} sum to 1")
        _check_score_from_attention(case, stack, name)


def _check_score_from_attention(case: Case, stack: Stack, name: str) -> None:
    inputs, targets, plain = case.inputs, case.targets, case.scores
    with Recorder(case.adapter.model, attention=dict.fromkeys(stack.attention, True)) as recorder:
        found = case.adapter.forward(inputs, targets)
        recorder.check()
        weights = [recorder.weights[path] for path in stack.attention]
        case.equal(found.detach(), plain, f"recording the attention of stack {name!r} changes no score")
        if any(hop.stack == name for hop in case.structure.path):
            _require(found.requires_grad, f"the score depends on the attention of stack {name!r}", "a gradient", "none")
            slopes = torch.autograd.grad(found.sum(), weights, allow_unused=True)
            live = any(slope is not None and bool(slope.any()) for slope in slopes)
            _require(live, f"the score depends on the attention of stack {name!r}", "a gradient", "zero")


def pooling(case: Case) -> None:
    """Chains of attention start at weights that sum to 1."""
    if not case.structure.path:
        return
    first = case.structure.stack(case.structure.path[0].stack)
    count = len(case.targets)
    if first.items == "sequence":
        rows = case.targets.chain_start
        what = "targets read from a sequence have chain_start"
        _require(rows is not None, what, "weights (K, Q)", "None")
        return
    [path], images = first.attention[-1:], case.inputs.images
    with Recorder(case.adapter.model, attention={path: False}) as recorder:
        case.adapter.encode_images(images)
        recorder.check()
    tokens = recorder.weights[path].shape[-2]
    rows = case.adapter.pooling_weights(case.kind, count, tokens)
    _require(rows.shape == (count, tokens), "pooling_weights are (K, N)", (count, tokens), _size(rows))
    case.equal(rows.sum(-1), torch.ones_like(rows[:, 0]), "pooling_weights sum to 1")


def shortcut(case: Case) -> None:
    """The shortcut equals the slow reference, under each backward rule."""
    fast = case.adapter.shortcut(case.kind)
    if fast is None or case.targets.baseline_sequence is not None:
        return
    for layer, others in fast.layers.items():
        outputs = _recorded(case, [layer, *others])
        for rule in (None, "layernorm"):
            found = fast.pooled_gradient(layer, case.inputs, case.targets, outputs, rule)
            slow = pooled_gradient(case.adapter, case.inputs, case.targets, layer, rule)
            under = f" under the rule {rule!r}" if rule else ""
            case.equal(found, slow, f"the shortcut at {layer!r} equals the slow reference{under}")
        with Recorder(case.adapter.model):
            features = fast.features(layer, outputs[layer], case.inputs.images)
            if features is not None:
                found = case.adapter.score(case.inputs, features, case.targets)
                case.equal(found, case.scores, f"features of the shortcut at {layer!r} give the scores")


def generation(case: Case) -> None:
    """A model that generates gives each query its text: forced ones as they are, others with their origin."""
    adapter = case.adapter
    if not isinstance(adapter, Generates):
        return
    inputs = prepare(adapter, case.images[:1], [[Generate(), case.texts[0][0]]], case.kind)
    origins = [text.origin for text in inputs.texts]
    _require(origins == ["generated", "forced"], "texts have an origin", "generated, forced", ", ".join(origins))
    for text in inputs.texts:
        _check_offsets(text)


def state(case: Case) -> None:
    """The model is as it was before: also after an error in the forward pass."""
    adapter, model = case.adapter, case.adapter.model
    explain(adapter, case.images[0], case.texts[0][0], target=case.kind)  # transformers installs hooks for good
    with _disturbed(model):
        before = _state(model)
        explain(adapter, case.images[0], case.texts[0][0], target=case.kind)
        _unchanged(before, _state(model), "an explanation")
        handle = find_module(model, case.structure.default_layer).register_forward_hook(_fail)
        before = _state(model)
        try:
            with contextlib.suppress(Failure):
                explain(adapter, case.images[0], case.texts[0][0], target=case.kind)
            _unchanged(before, _state(model), "an error in the forward pass")
        finally:
            handle.remove()


def maps(case: Case) -> None:
    """Every method that the attention suffices for gives finite maps, in a batch as one by one."""
    adapter = case.adapter
    names = [name for name in adapter.default_methods if name in available(case.structure)]
    found = explain(adapter, case.images, case.texts, target=case.kind, methods=names)
    for b, (image, own) in enumerate(zip(case.images, case.texts, strict=True)):
        for one, text in zip(found[b], own, strict=True):
            alone = explain(adapter, image, text, target=case.kind, methods=names)
            for name in names:
                made, expected = (torch.from_numpy(e.methods[name].maps) for e in (one, alone))
                limit = max(case.tolerance, 1e-5)  # maps are stored as float32
                case.equal(made, expected, f"maps of {name!r} of a batch are those of single images", limit)


CHECKS: Mapping[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        members,
        structure,
        views,
        patches,
        spans,
        forward,
        gradients,
        images_independent,
        texts_independent,
        texts,
        token_targets,
        text_independent,
        attention,
        pooling,
        shortcut,
        generation,
        state,
        maps,
    )
}


# ---------------------------------------------------------------- parts of checks


def _require(condition: bool, requirement: str, expected: object, seen: object) -> None:
    if not condition:
        raise Violation(f"{requirement}; expected {_short(expected)}, got {_short(seen)}")


def _short(value: object) -> str:
    return escape(" ".join(str(value).split()))[:200]


def _requirement(name: str) -> str:
    return (CHECKS[name].__doc__ or name).strip().rstrip(".")


def _of_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, 300)}"


def _size(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _kinds(adapter: Adapter) -> list[str]:
    """The kinds of targets that this model has: the default, and those that `check_target` accepts."""
    kinds = list(adapter.target_kinds[:1])
    for kind in adapter.target_kinds[1:]:
        with contextlib.suppress(TargetError):
            kinds.append(adapter.check_target(kind)[0])
    return kinds


def _supported(case: Case, token_target_names: Sequence[str]) -> list[str]:
    """Those that `check_target` accepts for the kind of target."""
    found = []
    for name in token_target_names:
        with contextlib.suppress(TargetError):
            case.adapter.check_target(case.kind, name)
            found.append(name)
    return found


def _token_scores(case: Case, token_target: str) -> Tensor:
    return scores(case.adapter, case.inputs, case.targets_of(case.inputs, token_target))


def _a_method(case: Case) -> list[str]:
    return ["gradcam"] if "gradcam" in available(case.structure) else [available(case.structure)[0]]


def _recorded(case: Case, paths: Sequence[str]) -> dict[str, Tensor]:
    """Outputs of modules in a forward pass without gradients."""
    inputs, targets = case.inputs, case.targets
    with Recorder(case.adapter.model, dict.fromkeys(paths, False)) as recorder:
        case.adapter.forward(inputs, targets)
        recorder.check()
    return recorder.outputs


def _pooled(case: Case) -> Tensor:
    """The pooled gradient (K, D) at the default layer by the general path of the engine."""
    path = case.structure.default_layer
    needs = frozenset({"pooled_gradient"})
    call = MethodCall("", "", Method("", needs, True, lambda trace: trace.pooled_gradient()), {}, path, (path,))
    plan = replace(plan_of(case.adapter, case.kind, [call]), shortcut=None)
    found: dict[int, Tensor] = {}
    for chunk in run_passes(case.adapter, case.inputs, case.targets, plan):
        trace = chunk.trace.at(path, needs)
        for members in trace.by_grid().values():  # images may have grids of their own
            own = trace.with_pooled(members).pooled_gradient()
            found |= {chunk.members[k]: gradient for k, gradient in zip(members, own, strict=True)}
    # Of a target that no text can change there is one per image.
    image = case.targets.image.tolist()
    first = {image[k]: found[k] for k in sorted(found, reverse=True)}
    return torch.stack([found.get(k, first[image[k]]) for k in range(len(case.targets))])


def _moved_scores(case: Case, layer: str, vector: Tensor) -> Tensor:
    """Scores with a vector added to all patches of a layer, a copy of the image for each target. Where the score of a
    text without a part is subtracted, the sequence of that text is not moved."""
    adapter = case.adapter
    inputs, targets = one_image_per_target(case.inputs, case.targets)

    def moved(_module: nn.Module, _args: object, output: Any) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        places = adapter.patch_tokens(layer, inputs, tuple(hidden.shape))[: len(targets)]
        hidden = shifted(hidden, places, vector.expand(len(targets), -1))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with Recorder(adapter.model):
        handle = find_module(adapter.model, layer).register_forward_hook(moved)
        try:
            return adapter.forward(inputs, targets)
        finally:
            handle.remove()


class Failure(Exception):  # noqa: N818
    """Raised in a forward pass to see what an error leaves behind."""


def _fail(*_: object) -> None:
    raise Failure


@contextlib.contextmanager
def _disturbed(model: nn.Module) -> Iterator[None]:
    """Modes and `requires_grad` that nobody would choose, so that a reset to the usual ones is noticed."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for i, module in enumerate(modes):
        module.training = i % 3 == 0
    for i, parameter in enumerate(wanted):
        parameter.requires_grad_(i % 2 == 0)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, required in wanted.items():
            parameter.requires_grad_(required)


def _state(model: nn.Module) -> dict[str, Any]:
    """State of a model that an explanation must leave unchanged."""
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "weights": {name: float(tensor.detach().double().sum()) for name, tensor in tensors},
        "gradients": {n: None if p.grad is None else float(p.grad.double().sum()) for n, p in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [list(h) for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)]
            for name, m in model.named_modules()
        },
        "attention implementation": [getattr(config, "_attn_implementation", None) for config in configs.values()],
        "random state": torch.get_rng_state().tolist(),
        "gradient mode": torch.is_grad_enabled(),
    }


def _unchanged(before: dict[str, Any], after: dict[str, Any], what: str) -> None:
    changed = [name for name, own in before.items() if own != after[name]]
    _require(not changed, f"the model is the same after {what}", "no change", f"other {', '.join(changed)}")
