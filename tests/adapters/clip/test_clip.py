"""CLIP: fast paths against the general path, texts, leave-one-out, attention masks."""

import numpy as np
import pytest
import torch

import adapters
from grounding import Selection, explain
from grounding.adapter.recorder import Recorder
from grounding.core.errors import ModelError, TextError
from grounding.engine.queries import prepare
from grounding.engine.signals import attentions
from tests.support import models
from tests.support.contract import default_layer, shortcut, structure, without_shortcuts
from tests.support.images import noise
from tests.support.oracles import vision
from tests.support.tolerances import HALF_MODEL, ORACLE, alike, close

CAPTION = "a man in a red jacket"


class Scaled(torch.nn.Module):
    """A linear layer with something added, as fine-tuning adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base, self.extra = base, torch.nn.Linear(base.in_features, base.out_features).double()

    def forward(self, x):
        return self.base(x) + self.extra(x)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_recorded_however_the_model_was_loaded(implementation, image):
    adapter = models.clip_adapter(attention=implementation)
    expected = adapter.model.vision_model
    found = attentions(adapter, prepare(adapter, [image], [[CAPTION]]))
    adapter.model.set_attn_implementation("eager")
    pixels = prepare(adapter, [image], [[CAPTION]]).images.tensors["pixel_values"]
    for mine, theirs in zip(found, expected(pixels, output_attentions=True).attentions, strict=True):
        assert close(mine.detach(), theirs.detach())


def test_recorded_attention_keeps_causal_and_padding_masks(clip, image):
    """A registered attention function without its mask function would drop both in silence."""
    inputs = prepare(clip, [image], [["red car", "the quick brown fox jumps"]])
    texts = {name: inputs.tensors[name] for name in ("input_ids", "attention_mask")}
    texts["attention_mask"][1, 2] = 0
    with torch.no_grad():
        expected = clip.model.get_text_features(**texts).pooler_output
    with Recorder(clip.model, attention=dict.fromkeys(structure(clip).stacks["vision"].attention, False)):
        found = clip.model.get_text_features(**texts).pooler_output
    assert close(found, expected)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("method", ["gradcam", "gradcam_ln"])
def test_fast_taps_of_towers_with_few_blocks(layers, method, image, monkeypatch):
    adapter = models.clip_adapter(layers=layers)
    layers = shortcut(adapter).layers
    assert len(layers) == 2
    for layer in layers:
        fast = explain(adapter, image, CAPTION, methods=[method], layers=[layer])
        with monkeypatch.context() as patch:
            without_shortcuts(patch, adapter)
            slow = explain(adapter, image, CAPTION, methods=[method], layers=[layer])
        assert close(fast.methods[method].maps, slow.methods[method].maps)


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
@pytest.mark.parametrize("change", ["wrapper", "hook", "forward"])
def test_a_changed_block_is_run_and_not_recomputed(clip, image, tower, change):
    block = clip.model.get_submodule(tower).encoder.layers[-1]
    before = explain(clip, image, CAPTION, methods=["gradcam"])
    if change == "wrapper":
        block.self_attn.k_proj = Scaled(block.self_attn.k_proj)
    elif change == "forward":
        plain = block.self_attn.v_proj.forward
        block.self_attn.v_proj.forward = lambda x: 0.3 * plain(x)
    else:
        block.self_attn.register_forward_hook(lambda module, args, out: (0.1 * out[0], *out[1:]))
    found = explain(clip, image, CAPTION, methods=["gradcam"])
    for entry, (score, features, gradient, _) in zip(
        found, tutorial_runs(clip, image, CAPTION, default_layer(clip)), strict=True
    ):
        assert entry.entry.score == pytest.approx(score, abs=1e-6)
        assert close(entry.raw.ravel(), vision.gradcam(features[1:], gradient[1:]))
    assert np.abs(found[0].raw - before[0].raw).max() > 0.01 * np.abs(before[0].raw).max()


def tutorial_runs(adapter, image, caption, layer):
    """The tutorial loop for the caption and each of its tokens left out."""
    whole = vision.text_embedding(adapter.model, adapter.tokenizer, caption)
    count = len(adapter.tokenizer(caption)["input_ids"]) - 2
    left = [vision.text_embedding(adapter.model, adapter.tokenizer, caption, [i + 1]) for i in range(count)]
    pixels = adapter.image_processor(image, return_tensors="pt")["pixel_values"].to(adapter.dtype)
    tutorial = vision.Tutorial(adapter.model, pixels)
    return [tutorial.run(seed, layer) for seed in [whole, *(whole - other for other in left)]]


def test_large_features_do_not_overflow_in_half_precision(image):
    """Squares of features above 255 overflow in float16: a live layer must not look dead."""
    half, double = (models.clip_adapter(dtype=dtype) for dtype in (torch.float16, torch.float64))
    with torch.no_grad():
        for adapter in (half, double):
            adapter.model.vision_model.encoder.layers[-2].mlp.fc2.bias[0] += 400
    found, expected = (explain(a, image, CAPTION, methods=["gradcam"], layers=["-2"])[0].raw for a in (half, double))
    assert alike(found, expected, HALF_MODEL)


def test_an_end_token_inside_the_text_is_an_error(clip, image):
    clip.model.text_model.eos_token_id = clip.tokenizer(" car")["input_ids"][-2]
    with pytest.raises(TextError, match=r"up to token \d of \d+ only"):
        explain(clip, image, "red car bus")


def test_an_adapter_needs_its_parts():
    with pytest.raises(ModelError, match="needs a processor, or a tokenizer and an image_processor"):
        adapters.ClipAdapter(models.clip_model())


def test_leave_one_out_masks_and_alone_is_a_text_of_its_own(clip, image):
    from tests.support.oracles.vision import text_embedding

    inputs = prepare(clip, [image], [["red car"]])
    embedded = clip.model.get_image_features(inputs.images.tensors["pixel_values"]).pooler_output[0].detach()
    embedded = embedded / embedded.norm()
    count = len(inputs.texts[0].visible)
    whole = text_embedding(clip.model, clip.tokenizer, "red car")
    found = explain(clip, image, "red car", methods=["rollout"])
    expected = [whole @ embedded] + [
        (whole - text_embedding(clip.model, clip.tokenizer, "red car", [i + 1])) @ embedded for i in range(count)
    ]
    assert close([e.score for e in found.entries], torch.stack(expected))
    alone = explain(clip, image, "red car", methods=["rollout"], token_target="alone", select=Selection(words=True))
    assert [e.label for e in alone.entries] == ["red car", "red", "car"]
    assert close(alone.entries[1].score, text_embedding(clip.model, clip.tokenizer, "red") @ embedded)
    assert close(alone.entries[2].score, text_embedding(clip.model, clip.tokenizer, " car") @ embedded)


@pytest.mark.parametrize("eos", [1, 2])
def test_shared_prefixes_change_no_embedding(eos):
    """Leave-one-out with the causal prefix shared, against a text forward of its own per masked span, lengths mixed."""
    from adapters.clip.leave_one_out import embed_left_out
    from adapters.shared.tokenization import pad

    adapter = models.clip_adapter()
    adapter.model.text_model.eos_token_id = eos  # 2: the pooling of old configurations, at the largest id
    found = [[0, 5, 280, 30, 9, 1], [0, 77, 1], [0, 40, 41, 42, 43, 44, 1]]
    found = [[299 if i == 1 else i for i in ids] for ids in found] if eos == 2 else found
    ids, mask = pad(found, 1, torch.device("cpu"))
    texts, hidden = [0, 0, 1, 2, 2, 2], [(1,), (4,), (1,), (2, 3), (1, 5), (5,)]
    masks = mask[texts].clone()
    for row, positions in enumerate(hidden):
        masks[row, list(positions)] = 0
    with torch.no_grad():
        shared = embed_left_out(adapter.model, ids, mask, texts, hidden)
    assert close(shared, adapter.embed_texts(ids[texts], masks))


def test_a_long_text_is_cut_with_its_end_token_and_said(clip, image):
    text = " ".join(f"word{i}" for i in range(30))
    found = explain(clip, image, text)
    tokens = prepare(clip, [image], [[text]]).texts[0]
    assert len(tokens) == models.LIMIT
    assert tokens.ids[-1] == clip.tokenizer.eos_token_id
    assert text.endswith(tokens.dropped)
    assert any("longer than the model's 24 tokens" in w and "word29" in w for w in found.warnings)
    with pytest.raises(TextError, match="does not read"):
        explain(clip, image, text, select=Selection(phrases=["word29"]))
    cut = explain(clip, image, text, select=Selection(words=True))
    assert all(entry.end <= len(text) - len(tokens.dropped) for entry in cut.entries[1:])


def test_literal_special_tokens_are_ordinary_characters(clip, image):
    found = explain(clip, image, "red <|endoftext|> car")
    assert "<|endoftext|>" in "".join(e.label for e in found.entries[1:])
    assert any("tokenized as ordinary characters" in w for w in found.warnings)
    tokens = prepare(clip, [image], [["red <|endoftext|> car"]]).texts[0]
    assert tokens.ids.count(clip.tokenizer.eos_token_id) == 1


def test_tokens_by_name_and_repeated_words(clip, image):
    found = explain(clip, image, "red car and red bus", select=Selection(words=True))
    assert [e.label for e in found.entries].count("red") == 2
    first, second = (found.map("red", occurrence=i) for i in (0, 1))
    assert (first.entry.start, second.entry.start) == (0, 12)
    assert not np.array_equal(first.raw, second.raw)
    with pytest.raises(TextError, match=r"'blue' is not in the caption; it has 0:"):
        explain(clip, image, CAPTION, select=Selection(tokens=["blue"]))
    with pytest.raises(TextError, match="does not occur"):
        explain(clip, image, CAPTION, select=Selection(phrases=["green hat"]))


def test_padding_gets_no_map_and_changes_nothing(clip):
    short, long = "red car", "the quick brown fox jumps over"
    together = explain(clip, [noise(50, 40, 1)], [[short, long]])[0]
    for text, found in zip((short, long), together, strict=True):
        alone = explain(clip, noise(50, 40, 1), text)
        assert [e.label for e in found.entries] == [e.label for e in alone.entries]
        assert close(found.methods["relevance"].maps, alone.methods["relevance"].maps, ORACLE)
