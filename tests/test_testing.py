"""`check_adapter`: every check sees the fault that it is for, in one line, and good adapters pass."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from grounding.adapter.inputs import Targets
from grounding.adapter.structure import Hop, ModelStructure, Stack
from grounding.core.errors import GroundingError
from grounding.testing import CHECKS, ContractError, check_adapter
from tests.support import models
from tests.support.images import noise
from tests.support.third_party import MeanAdapter

IMAGES = [noise(90, 60), noise(50, 70, 3)]
TEXTS = [["a man in a red jacket", "two dogs"], ["red car"]]


class TwoKinds(MeanAdapter):
    target_kinds = ("similarity", "similarity")
    text_independent = ()


class AnyKind(MeanAdapter):
    def check_target(self, kind, token_target=None):
        return kind or "similarity", token_target or "leave-one-out"


class UnknownMethod(MeanAdapter):
    default_methods = ("gradkam",)


class NoSuchBlock(MeanAdapter):
    def structure(self, kind):
        return replace(super().structure(kind), default_layer="blocks.7")


class FewInputs(MeanAdapter):
    def structure(self, kind):
        own = super().structure(kind)
        return replace(own, stacks={"vision": replace(own.stacks["vision"], inputs=("blocks.0.norm",))})


class Silent(MeanAdapter):
    """No attention, and no word why."""

    def structure(self, kind):
        return ModelStructure({"vision": Stack(("blocks.0", "blocks.1"))}, "blocks.1", "mean")


class PathWithoutAttention(MeanAdapter):
    def structure(self, kind):
        return ModelStructure({"vision": Stack(("blocks.1",))}, "blocks.1", "mean", path=(Hop("vision"),))


class OfInput(MeanAdapter):
    """A geometry of the resized image in place of the original one."""

    def prepare_images(self, images):
        made = super().prepare_images(images)
        wrong = replace(made.views[0].geometry, width=40, height=24)
        return replace(made, views=(replace(made.views[0], geometry=wrong), *made.views[1:]))


class OneRow(MeanAdapter):
    def prepare_images(self, images):
        made = super().prepare_images(images)
        return replace(made, tensors={**made.tensors, "mask": torch.ones(1, 3)})


class OtherGrid(MeanAdapter):
    """15 patches, but not 5 x 3."""

    def prepare_images(self, images):
        made = super().prepare_images(images)
        return replace(made, views=tuple(replace(v, geometry=v.geometry.with_grid(5, 3)) for v in made.views))

    def patch_tokens(self, path, inputs, shape):
        return tuple(replace(p, index=p.index.reshape(3, 5)) for p in super().patch_tokens(path, inputs, shape))


class OneView(MeanAdapter):
    def patch_tokens(self, path, inputs, shape):
        return super().patch_tokens(path, inputs, shape)[:1]


class Repeated(MeanAdapter):
    def patch_tokens(self, path, inputs, shape):
        return tuple(replace(p, index=0 * p.index) for p in super().patch_tokens(path, inputs, shape))


class Captions(MeanAdapter):
    """One target for each text, whatever spans are asked for."""

    def targets(self, inputs, spans, kind, token_target=None):
        return super().targets(inputs, [own[:1] for own in spans], kind, token_target)


class Backwards(MeanAdapter):
    def targets(self, inputs, spans, kind, token_target=None):
        found = super().targets(inputs, spans, kind, token_target)
        return found.select(list(range(len(found)))[::-1])


class ByPlace(MeanAdapter):
    """The score of a target depends on its place among the others."""

    def score(self, inputs, features, targets):
        return super().score(inputs, features, targets) + torch.arange(len(targets))


class OneScore(MeanAdapter):
    def score(self, inputs, features, targets):
        return super().score(inputs, features, targets)[:1]


class Drifting(MeanAdapter):
    """Every call gives another score."""

    calls = 0

    def score(self, inputs, features, targets):
        self.calls += 1
        return super().score(inputs, features, targets) * self.calls


class NoGraph(MeanAdapter):
    def encode_images(self, images):
        with torch.no_grad():
            return super().encode_images(images)


class HalfGraph(MeanAdapter):
    """A part of the score is computed from detached features: its gradient is a wrong one, and no error."""

    def score(self, inputs, features, targets):
        return super().score(inputs, features, targets) * features.detach().norm(dim=-1)[targets.image] ** 2


class DeadLayer(MeanAdapter):
    def structure(self, kind):
        return replace(super().structure(kind), default_layer="unread")

    def __init__(self):
        super().__init__()
        self.model.unread = nn.Identity()
        forward = self.model.forward

        def also(pixels):
            return forward(pixels) + 0 * self.model.unread(self.model.stem(pixels).flatten(2).mT).sum()

        self.model.forward = also


class BatchMean(MeanAdapter):
    def encode_images(self, images):
        features = super().encode_images(images)
        return features - 0.5 * features.mean(0)


class LeakyGradient(MeanAdapter):
    """Scores are those of the image alone; their gradients reach the other images."""

    def encode_images(self, images):
        features = super().encode_images(images)
        return features + (features.sum(0) - features.sum(0).detach())


class TextMean(MeanAdapter):
    def targets(self, inputs, spans, kind, token_target=None):
        found = super().targets(inputs, spans, kind, token_target)
        return (
            replace(found, data={"seeds": found.data["seeds"] - found.data["seeds"].mean(0)}) if found.data else found
        )


class Shortening(MeanAdapter):
    """Cuts texts after eight words, and tells nobody."""

    def prepare_texts(self, images, queries):
        made = super().prepare_texts(images, queries)
        return replace(
            made,
            texts=tuple(replace(t, ids=t.ids[:8], offsets=t.offsets[:8], special=t.special[:8]) for t in made.texts),
        )


class Unwarned(Shortening):
    """Names what was cut, without a warning."""

    def prepare_texts(self, images, queries):
        made = super().prepare_texts(images, queries)
        return replace(made, texts=tuple(replace(t, dropped=t.text[t.offsets[-1][1] :]) for t in made.texts))


class Upper(MeanAdapter):
    def prepare_texts(self, images, queries):
        return super().prepare_texts(images, [[replace(q, text=q.text.upper()) for q in own] for own in queries])


class Outside(MeanAdapter):
    def prepare_texts(self, images, queries):
        made = super().prepare_texts(images, queries)
        texts = tuple(replace(t, offsets=tuple((a + 99, b + 99) for a, b in t.offsets)) for t in made.texts)
        return replace(made, texts=texts)


class OneTarget(MeanAdapter):
    """Takes no notice of how a part of a text is to be scored."""

    def targets(self, inputs, spans, kind, token_target=None):
        found = super().targets(inputs, spans, kind, "alone")
        return replace(found, token_target=token_target)


class NotAlone(MeanAdapter):
    """`alone` is half of the text's own score."""

    def targets(self, inputs, spans, kind, token_target=None):
        found = super().targets(inputs, spans, kind, token_target)
        if token_target != "alone" or not found.data:
            return found
        half = torch.tensor([1.0 if span.kind == "caption" else 0.5 for span in found.spans])
        return replace(found, data={"seeds": found.data["seeds"] * half[:, None]})


class Blind(MeanAdapter):
    """The score is that of the image, but `text_independent` does not say so."""

    text_independent = ()

    def targets(self, inputs, spans, kind, token_target=None):
        return Targets.of_spans(inputs, spans, kind, self.check_target(kind, token_target)[1])

    def score(self, inputs, features, targets):
        return features.norm(dim=-1)[targets.image]


class ByText(MeanAdapter):
    """`norm` depends on which text it is."""

    def score(self, inputs, features, targets):
        found = super().score(inputs, features, targets)
        return found + targets.text if targets.kind == "norm" else found


class Reported(nn.Module):
    """Attention whose weights are only reported: the output is computed without them."""

    def __init__(self, plain):
        super().__init__()
        self.plain, self.sum = plain, 1.0

    def forward(self, x, output_attentions=False):
        out = self.plain.out(self.plain.qkv(x)[..., : x.shape[-1]])
        weights = torch.full((len(x), 1, x.shape[1], x.shape[1]), self.sum / x.shape[1], dtype=x.dtype)
        return (out, weights) if output_attentions else (out, None)


class ReportedAttention(MeanAdapter):
    def __init__(self, total=1.0):
        super().__init__()
        for block in self.model.blocks:
            reported = Reported(block.attend)
            reported.sum = total
            block.attend = _First(reported)

    def structure(self, kind):
        own = super().structure(kind)
        stack = own.stacks["vision"]
        return replace(own, stacks={"vision": replace(stack, attention=tuple(f"{p}.both" for p in stack.attention))})


class _First(nn.Module):
    def __init__(self, both):
        super().__init__()
        self.both = both

    def forward(self, x):
        return self.both(x)[0]


class TwiceThePooling(MeanAdapter):
    def pooling_weights(self, kind, count, tokens):
        return 2 * super().pooling_weights(kind, count, tokens)


class WrongShortcut(MeanAdapter):
    """The gradient is right at the last block, but under the backward rule, or its features are not."""

    def __init__(self, rule=None, features=1.0):
        super().__init__()
        self.rule, self.features = rule, features

    def shortcut(self, kind):
        return MeanShortcut(self)


class MeanShortcut:
    """At the last block, whose patches are averaged: no norm follows, so the rule changes nothing."""

    def __init__(self, adapter):
        self.adapter, self.layers = adapter, {"blocks.1": ()}

    def pooled_gradient(self, layer, inputs, targets, outputs, rule):
        mean = outputs[layer].mean(1)[targets.image].requires_grad_()
        with torch.enable_grad():
            own = replace(targets, image=torch.arange(len(targets)))
            [gradient] = torch.autograd.grad(self.adapter.score(inputs, mean, own).sum(), mean)
        return (
            gradient * (1.5 if rule and self.adapter.rule == rule else 1.0) * (0.9 if self.adapter.rule == "any" else 1)
        )

    def features(self, layer, output, images):
        return output.mean(1) * torch.linspace(1, self.adapter.features, output.shape[-1])


class Trained(MeanAdapter):
    """Leaves the model in evaluation mode, whatever mode it was in."""

    def prepare_images(self, images):
        self.model.eval()
        return super().prepare_images(images)


class LeftHook(MeanAdapter):
    """A hook that is removed only if nothing fails."""

    def encode_images(self, images):
        handle = self.model.stem.register_forward_hook(lambda module, args, out: None)
        features = super().encode_images(images)
        handle.remove()
        return features


class Rotating(MeanAdapter):
    """A batch of several images is read with the patches of another order: scores are the same, maps are not."""

    def patch_tokens(self, path, inputs, shape):
        found = super().patch_tokens(path, inputs, shape)
        return tuple(replace(p, index=p.index[::-1].copy()) for p in found) if len(inputs.images) > 1 else found


FAULTS = [
    ("members", TwoKinds, "target_kinds are different; expected no repetition, got ('similarity', 'similarity')"),
    ("members", AnyKind, "targets refuses unknown kinds; expected TargetError, got no error"),
    ("members", UnknownMethod, "default_methods; expected names in METHODS, got ('gradkam',)"),
    ("structure", NoSuchBlock, "structure names modules of the model; expected 'blocks.7', got"),
    ("structure", FewInputs, "stack 'vision' has as many inputs as blocks, or none; expected 2, got 1"),
    ("structure", Silent, "unrecorded says why attention is missing; expected a reason, got ''"),
    ("structure", PathWithoutAttention, "the path goes through attention that is recorded: stack 'vision'; expected"),
    ("views", OfInput, "the geometry of a view is that of its image; expected size (90, 60), got (40, 24)"),
    ("views", OneRow, "the leading axis of 'mask' counts images (or packed rows); expected 2, got 1"),
    ("patches", OtherGrid, "the default layer has the patch grid of the geometry; expected (5, 3), got (3, 5)"),
    ("patches", OneView, "patch_tokens has one item per view; expected [0, 1], got [0]"),
    ("patches", Repeated, "each patch has a position of its own; expected no repetition, got [0, 0,"),
    ("spans", Captions, "one target for each span; expected 13, got 3"),
    ("spans", Backwards, "targets follow texts and their spans in order; expected"),
    ("spans", ByPlace, "the score of a target does not depend on the other targets; expected a relative difference"),
    ("forward", OneScore, "one score per target; expected (13,), got (1,)"),
    ("forward", Drifting, "explain reports the scores of the adapter; expected a relative difference"),
    ("gradients", NoGraph, "that of the score, and not zero; expected no error, got RuntimeError"),
    ("gradients", HalfGraph, "the gradient at the default layer equals a difference quotient of the score; expected"),
    (
        "gradients",
        DeadLayer,
        "the score depends on the patches of the default layer 'unread'; expected a gradient, got zero",
    ),
    ("images_independent", BatchMean, "images are independent: a batch has the scores of single images; expected"),
    ("images_independent", LeakyGradient, "one backward pass gives each image's gradient; expected"),
    ("texts_independent", TextMean, "texts are independent: several texts have the scores of single texts; expected"),
    ("texts", Shortening, "every word is in a token, or in dropped; expected tokens up to"),
    ("texts", Unwarned, "a truncated text has a warning; expected warnings, got none"),
    ("texts", Upper, "prepare_texts keeps the text as it is; expected 'a man in a red jacket', got 'A MAN"),
    ("texts", Outside, "offsets are spans of the text; expected 0 to 21, got"),
    ("token_targets", OneTarget, "token_targets differ; expected two scores, got the same"),
    ("token_targets", NotAlone, "`alone` scores a part as a text of its own; expected a relative difference"),
    ("text_independent", Blind, "the score depends on the text (or is in text_independent); expected"),
    ("text_independent", ByText, "no text changes the score; expected a relative difference"),
    ("attention", ReportedAttention, "the score depends on the attention of stack 'vision'; expected a gradient, got"),
    ("attention", lambda: ReportedAttention(0.5), "rows of the attention of 'blocks.0.attend.both' sum to 1; expected"),
    ("pooling", TwiceThePooling, "pooling_weights sum to 1; expected a relative difference"),
    ("shortcut", lambda: WrongShortcut("any"), "the shortcut at 'blocks.1' equals the slow reference; expected"),
    ("shortcut", lambda: WrongShortcut("layernorm"), "equals the slow reference under the rule 'layernorm'; expected"),
    ("shortcut", lambda: WrongShortcut(None, 1.5), "features of the shortcut at 'blocks.1' give the scores; expected"),
    ("state", Trained, "the model is the same after an explanation; expected no change, got other training"),
    (
        "state",
        LeftHook,
        "the model is the same after an error in the forward pass; expected no change, got other h",
    ),
    ("maps", Rotating, "maps of 'gradcam' of a batch are those of single images; expected a relative difference"),
]


@pytest.mark.parametrize(("check", "make", "line"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_sees_its_fault(check, make, line):
    with pytest.raises(ContractError) as caught:
        check_adapter(make(), IMAGES, TEXTS, checks=[check])
    head, *lines = str(caught.value).splitlines()
    assert head.endswith("does not meet the adapter contract:")
    assert any(found.startswith(f"{check} (") and line in found for found in lines), lines


def test_generated_texts_have_an_origin():
    adapter = models.trocr_adapter()
    check_adapter(adapter, IMAGES, TEXTS, checks=["generation"])
    own = adapter.generate
    adapter.generate = lambda *args: [replace(text, origin="given") for text in own(*args)]
    with pytest.raises(ContractError, match=r"generation \(logit\): texts have an origin; expected generated, forced"):
        check_adapter(adapter, IMAGES, TEXTS, checks=["generation"])


def test_every_check_has_a_fault():
    assert {check for check, *_ in FAULTS} | {"generation"} == set(CHECKS)


def test_a_good_adapter_passes_and_all_lines_are_reported():
    check_adapter(MeanAdapter(), IMAGES, TEXTS)
    check_adapter(MeanAdapter(), IMAGES, ["a red car", "two dogs"])
    check_adapter(WrongShortcut(), IMAGES, TEXTS, checks=["shortcut"])
    with pytest.raises(ContractError) as caught:
        check_adapter(Upper(), IMAGES, TEXTS, kinds=["similarity"])
    assert len(str(caught.value).splitlines()) >= 2


def test_wrong_arguments_are_refused():
    with pytest.raises(GroundingError, match="two or more images"):
        check_adapter(MeanAdapter(), IMAGES[:1], TEXTS[:1])
    with pytest.raises(GroundingError, match="and two different texts"):
        check_adapter(MeanAdapter(), IMAGES, ["a red car", "a red car"])
    with pytest.raises(GroundingError, match=r"no check 'speed' \(there are: members, structure"):
        check_adapter(MeanAdapter(), IMAGES, TEXTS, checks=["speed"])
    with pytest.raises(GroundingError, match=r"float32 or float64, got torch.float16"):
        check_adapter(models.clip_adapter(dtype=torch.float16), IMAGES, TEXTS)
