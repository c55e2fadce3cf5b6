"""Encoder-decoders: every method against the corrected tutorial loop, generated and forced texts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SwinConfig, SwinModel, VisionEncoderDecoderModel

from adapters.shared.generation import tokens_of
from adapters.trocr.adapter import TrOcrAdapter
from grounding import Selection, explain
from grounding.core.errors import LayerError, ModelError, OptionError, TargetError, TextError
from grounding.core.text import Generate
from grounding.engine import passes as tracing
from grounding.engine.queries import prepare
from grounding.engine.signals import attentions
from tests.support import models
from tests.support.contract import shortcut, structure, without_shortcuts
from tests.support.images import noise
from tests.support.oracles import decoder, vision
from tests.support.tolerances import ORACLE, STORED, TUTORIAL, close
from tests.support.tutorials.trocr import TOKENS, tutorial

TEXT = "red car and red bus"
VARIANTS = {
    "trocr": {},
    "sinusoidal positions": {"kind": "sinusoidal"},
    "other width": {"width": 24},
    "bert": {"kind": "bert"},
    "gpt2": {"kind": "gpt2"},
    "deit": {"encoder": "deit"},
}


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request):
    return models.trocr_adapter(**VARIANTS[request.param])


def patches(adapter, rows):
    """(N,) rows as (rows, columns) maps."""
    return np.array(rows)[:, structure(adapter).prefix :].reshape(len(rows), 2, 8)


@pytest.mark.parametrize("layer", ["encoder.layers.2", "encoder.layers.1", "encoder.layernorm"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ORACLE), (torch.float32, TUTORIAL)])
def test_gradcam_equals_the_corrected_tutorial_loop(layer, dtype, tolerance):
    adapter = models.trocr_adapter(dtype=dtype)
    found = explain(adapter, noise(90, 30), TEXT, methods=["gradcam"], layers=[layer], select=TOKENS)
    loop = tutorial(adapter, TEXT, layer)
    expected = [vision.gradcam(f[1:], g[1:]) for _, f, g, _ in loop]
    assert close(found.methods["gradcam"].maps.reshape(len(loop), -1), expected, tolerance)
    assert close([e.score for e in found.entries], [score for score, *_ in loop], tolerance)


def test_gradcam_of_every_kind_of_model(variant):
    found = explain(variant, noise(90, 30), TEXT, methods=["gradcam"], select=TOKENS)
    expected = [
        vision.gradcam(f[structure(variant).prefix :], g[structure(variant).prefix :])
        for _, f, g, _ in tutorial(variant, TEXT)
    ]
    assert close(found.methods["gradcam"].maps.reshape(len(expected), -1), expected)


@pytest.mark.parametrize("layer", ["encoder.layers.2", "encoder.layers.0", "encoder.layernorm"])
def test_gradcam_ln_equals_a_loop_with_its_norms_written_out(variant, layer, monkeypatch):
    found = explain(variant, noise(90, 30), TEXT, methods=["gradcam_ln"], layers=[layer], select=TOKENS)
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", vision.constant_deviation_norm)
    prefix = structure(variant).prefix
    expected = [vision.gradcam(f[prefix:], g[prefix:]) for _, f, g, _ in tutorial(variant, TEXT, layer)]
    assert close(found.methods["gradcam_ln"].maps.reshape(len(expected), -1), expected)


def test_attention_methods_equal_their_oracles(variant):
    methods = ["rollout", "gradient_rollout", "attention", "cross_attention", "gradient_x_cross_attention", "relevance"]
    found = explain(variant, noise(90, 30), TEXT, methods=methods, select=TOKENS)
    expected = {name: [] for name in methods}
    for row, (_, _, _, pairs) in enumerate(tutorial(variant, TEXT)):
        seeing = [a for a, _ in pairs["vision"]]
        weights, gradient = pairs["cross"][-1]
        looks = weights.mean(0)[row]
        expected["cross_attention"].append(looks)
        expected["gradient_x_cross_attention"].append(vision.attention_gradcam(weights, gradient)[row])
        expected["rollout"].append(looks @ vision.rollout(seeing))
        expected["gradient_rollout"].append(looks @ vision.gradient_rollout(pairs["vision"]))
        expected["attention"].append(looks @ seeing[-1].mean(0))
        expected["relevance"].append(decoder.bimodal_relevance(pairs, vision.rollout(seeing))[row])
    for name in methods:
        assert close(found.methods[name].maps, patches(variant, expected[name]))


def test_full_relevance_through_the_encoder(variant):
    options = {"relevance.encoder": "relevance"}
    found = explain(variant, noise(90, 30), TEXT, methods=["relevance"], options=options, select=TOKENS)
    expected = []
    for row, (_, _, _, pairs) in enumerate(tutorial(variant, TEXT)):
        encoder = decoder.normalised(vision.relevance(pairs["vision"]))
        expected.append(decoder.bimodal_relevance(pairs, encoder)[row])
    assert close(found.methods["relevance"].maps, patches(variant, expected))


def test_rows_without_relevance_stay_zero_and_finite(trocr):
    """Rows behind the target have no gradient: N(R) must not divide by their zero."""
    found = explain(trocr, noise(90, 30), TEXT, methods=["relevance"], select=Selection(caption=False, tokens=["0"]))
    assert np.isfinite(found.methods["relevance"].maps).all()
    assert found.methods["relevance"].maps.max() > 0


def test_inner_blocks_and_heads(trocr):
    options = {"cross_attention.layer": 0, "cross_attention.head": 2, "gradient_x_cross_attention.layer": 0}
    methods = ["cross_attention", "gradient_x_cross_attention"]
    found = explain(trocr, noise(90, 30), TEXT, methods=methods, options=options, select=TOKENS)
    runs = [run[3]["cross"][0] for run in tutorial(trocr, TEXT)]
    assert close(found.methods["cross_attention"].maps, patches(trocr, [a[2][row] for row, (a, _) in enumerate(runs)]))
    expected = [vision.attention_gradcam(a, g)[row] for row, (a, g) in enumerate(runs)]
    assert close(found.methods["gradient_x_cross_attention"].maps, patches(trocr, expected))


def test_the_explained_token_is_the_one_that_was_written(trocr):
    """The known tutorial takes logit[t, ids[t]]: it explains the token before, and never the last one."""
    found = explain(trocr, noise(90, 30), None, methods=["gradcam"], select=TOKENS)
    pixels = prepare(trocr, [noise(90, 30)], [[TEXT]]).images.tensors["pixel_values"]
    sequence = trocr.model.generate(pixels, max_new_tokens=9, do_sample=False)[0].tolist()
    assert [e.token_id for e in found.entries] == sequence[1:]
    with torch.no_grad():
        logits = trocr.model(pixels, decoder_input_ids=torch.tensor([sequence[:-1]])).logits[0]
    for t, entry in enumerate(found.entries):
        assert entry.score == pytest.approx(float(logits[t, sequence[t + 1]]))
        assert sequence[t] == sequence[t + 1] or entry.score != pytest.approx(float(logits[t, sequence[t]]))
        assert close(entry.probability, logits[t].softmax(-1)[sequence[t + 1]].detach(), STORED)
        assert sequence[t + 1] == logits[t].argmax()
        assert entry.probability >= entry.alternatives[0].probability >= entry.alternatives[2].probability > 0
        assert entry.token_id not in [other.token_id for other in entry.alternatives]


def test_beams_follow_the_beam_that_won(trocr):
    found = explain(trocr, noise(90, 30), Generate(beams=4), methods=["cross_attention"], select=TOKENS)
    pixels = prepare(trocr, [noise(90, 30)], [[TEXT]]).images.tensors["pixel_values"]
    settings = {"num_beams": 4, "max_new_tokens": 9, "do_sample": False}
    out = trocr.model.generate(pixels, **settings, output_logits=True, return_dict_in_generate=True, output_scores=True)
    ids, beams = out.sequences[0, 1:].tolist(), out.beam_indices[0].tolist()
    assert [e.token_id for e in found.entries] == ids[: len(found.entries)]
    own = [float(out.logits[t][beams[t], token]) for t, token in enumerate(ids)]
    assert close([e.score for e in found.entries], own[: len(found.entries)])
    assert any(beam != 0 for beam in beams), "the winning beam never changed: nothing is tested"


def test_a_batch_of_lines_equals_one_by_one(trocr):
    images = [noise(90, 30), noise(70, 20, 1), noise(120, 30, 2)]
    texts = [None, "a red car", Generate(max_length=5)]
    methods = ["gradcam_ln", "rollout", "gradient_x_cross_attention"]
    together = explain(trocr, images, texts, methods=methods)
    assert [found.origin for found in together] == ["generated", "forced", "generated"]
    assert len({len(found.entries) for found in together}) == 3  # rows of different lengths: padding gets no map
    for image, text, found in zip(images, texts, together, strict=True):
        alone = explain(trocr, image, text, methods=methods)
        assert found.caption == alone.caption
        for key, column in found.methods.items():
            assert close(column.maps, alone.methods[key].maps)


def test_one_encoder_pass_and_one_backward_for_all_tokens(trocr, monkeypatch):
    methods = ["gradient_x_cross_attention", "cross_attention", "rollout"]
    for chosen in (methods, None):  # the first recorded pass is compared with a plain one
        explain(trocr, noise(90, 30), None, methods=chosen, select=TOKENS)
    passes, backwards = [], []
    handle = trocr.model.encoder.embeddings.register_forward_hook(lambda *_: passes.append(1))
    plain = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backwards.append(1) or plain(*a, **k))
    found = explain(trocr, noise(90, 30), None, methods=methods, select=TOKENS)
    assert len(found.entries) == 9
    assert (len(passes), len(backwards)) == (1, 1)
    explain(trocr, noise(90, 30), None, select=TOKENS)
    handle.remove()
    assert len(passes) == 2


def test_a_changed_decoder_is_run_and_not_recomputed(trocr):
    handle = trocr.model.decoder.model.decoder.layers[0].fc1.register_forward_hook(lambda _m, _a, out: 2 * out)
    assert not shortcut(trocr)
    found = explain(trocr, noise(90, 30), TEXT, methods=["gradcam"], select=TOKENS)
    expected = [vision.gradcam(f[1:], g[1:]) for _, f, g, _ in tutorial(trocr, TEXT)]
    assert close(found.methods["gradcam"].maps.reshape(len(expected), -1), expected)
    handle.remove()


def test_long_texts_run_over_several_segments(trocr, monkeypatch):
    """Rows of later segments read keys and values that earlier ones left on the graph."""
    text = "the quick brown fox jumps over the lazy dog"
    select = Selection(special=True, words=False, phrases=["brown fox"])
    whole = explain(trocr, noise(90, 30), text, methods=["gradcam", "gradcam_ln"], select=select)
    assert len(whole.entries) > 10
    monkeypatch.setattr("adapters.trocr.fast_decoder.SEGMENT", 3)
    short = explain(trocr, noise(90, 30), text, methods=["gradcam", "gradcam_ln"], select=select)
    without_shortcuts(monkeypatch, trocr)
    slow = explain(trocr, noise(90, 30), text, methods=["gradcam", "gradcam_ln"], select=select)
    for key, column in slow.methods.items():
        assert close(whole.methods[key].maps, column.maps)
        assert close(short.methods[key].maps, column.maps)


@pytest.mark.parametrize("fast", [True, False])
def test_log_probability(trocr, fast, monkeypatch):
    if not fast:
        without_shortcuts(monkeypatch, trocr)
    found = explain(trocr, noise(90, 30), TEXT, methods=["gradcam"], target="log_probability", select=TOKENS)
    assert close([e.score for e in found.entries], [np.log(e.probability) for e in found.entries], STORED)
    pixels = prepare(trocr, [noise(90, 30)], [[TEXT]]).images.tensors["pixel_values"]
    kept = {}
    handle = trocr.model.encoder.layers[2].register_forward_hook(lambda m, a, out: kept.update(f=out))
    ids = [e.token_id for e in found.entries]
    out = trocr.model(pixels, decoder_input_ids=torch.tensor([[0, *ids[:-1]]]))
    handle.remove()
    [gradient] = torch.autograd.grad(out.logits[0, 2].log_softmax(-1)[ids[2]], kept["f"])
    assert close(
        found.methods["gradcam"].maps[2].ravel(), vision.gradcam(kept["f"][0, 1:].detach().numpy(), gradient[0, 1:])
    )


def test_words_and_captions_are_means_over_their_tokens(trocr):
    text = "unbelievably photogenic"
    parts = explain(trocr, noise(90, 30), text, methods=["gradcam"], select=Selection(caption=False))
    found = explain(trocr, noise(90, 30), text, methods=["gradcam"], select=Selection(words=True))
    assert [e.label for e in found.entries] == [text, "unbelievably", "photogenic"]
    count = len(parts.entries)
    first = sum(e.end <= len("unbelievably") for e in parts.entries)
    for entry, own in ((0, slice(None)), (1, slice(0, first)), (2, slice(first, count))):
        assert found.entries[entry].score == pytest.approx(np.mean([e.score for e in parts.entries[own]]))
        assert found.entries[entry].probability is None
        assert close(found.methods["gradcam"].maps[entry], parts.methods["gradcam"].maps[own].mean(0))


def test_where_asks_for_another_token_at_a_place(trocr):
    methods = ["gradcam_ln", "cross_attention"]
    select = Selection(caption=False, tokens=["car"], where="bus")
    found = explain(trocr, noise(90, 30), TEXT, methods=methods, select=select)
    [entry] = found.entries
    bus = trocr.tokenizer(" bus", add_special_tokens=False)["input_ids"]
    assert (entry.kind, entry.label, [entry.token_id]) == ("where", "bus?", bus)
    assert TEXT[entry.start : entry.end] == "car"
    loop = decoder.Tutorial(
        trocr.model,
        prepare(trocr, [noise(90, 30)], [[TEXT]]).images.tensors["pixel_values"],
        [0, *trocr.tokenizer(TEXT, add_special_tokens=False)["input_ids"], 1],
    )
    assert entry.score == pytest.approx(loop.run(1, bus[0], "encoder.layers.2")[0])
    assert any("same for any other token" in w and "Cross-attention" in w for w in found.warnings)
    assert not any("same for any other token" in w and "LN-rule" in w for w in found.warnings)


def test_contrast_explains_a_difference_of_logits(trocr):
    """Linear: its map is the map of the first less the map of the second."""
    ask = {"methods": ["gradcam_ln"]}
    found = explain(trocr, noise(90, 30), TEXT, select=Selection(contrast=("car", "bus")), **ask)
    [entry] = found.entries
    assert (entry.kind, TEXT[entry.start : entry.end]) == ("contrast", "car")
    chosen = Selection(caption=False, tokens=["car"])
    first = explain(trocr, noise(90, 30), TEXT, select=chosen, **ask)
    second = explain(trocr, noise(90, 30), TEXT, select=replace(chosen, where="bus"), **ask)
    assert entry.score == pytest.approx(first.entries[0].score - second.entries[0].score)
    assert close(
        found.methods["gradcam_ln"].maps[0],
        first.methods["gradcam_ln"].maps[0] - second.methods["gradcam_ln"].maps[0],
        STORED,
    )
    placed = explain(trocr, noise(90, 30), TEXT, select=Selection(contrast=("dog", "man"), tokens=["4"]), **ask)
    assert TEXT[placed.entries[0].start :] == "bus"


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (
            Selection(contrast=("dog", "fox")),
            "neither 'dog' nor 'fox' is in 'red car and red bus': choose the position",
        ),
        (Selection(where="red bus"), r"'red bus' is 2 tokens of this model \('red', '\S+bus'\): ask for one"),
        (Selection(where="x", tokens=["blue"]), "'blue' is not in the caption; it has 0:'red'"),
    ],
)
def test_questions_that_make_no_sense_are_refused(trocr, select, words):
    with pytest.raises(TextError, match=words):
        explain(trocr, noise(90, 30), TEXT, select=select)


def test_a_text_that_was_cut_says_so_and_one_that_ended_does_not(trocr):
    cut = explain(trocr, noise(90, 30), Generate(max_length=3), methods=["cross_attention"], select=TOKENS)
    assert len(cut.entries) == 3
    assert any(w.startswith("stopped_by_length: the text was cut at 3 tokens") for w in cut.warnings)
    trocr.model.generation_config.forced_eos_token_id = 1
    ended = explain(trocr, noise(90, 30), Generate(max_length=3), methods=["cross_attention"], select=TOKENS)
    assert [e.token_id for e in ended.entries][-1] == 1
    assert not any("stopped_by_length" in w for w in ended.warnings)


def test_nothing_read_is_reported_and_its_end_explained(trocr):
    trocr.model.generation_config.forced_eos_token_id = 1
    for select in (None, TOKENS, Selection(words=True)):
        found = explain(trocr, Image.new("RGB", (200, 32), "white"), Generate(max_length=1), select=select)
        assert found.caption == ""
        assert [(e.label, e.token_id) for e in found.entries] == [("", 1)]
        assert any("generated no text" in w for w in found.warnings)


def test_generation_is_the_checkpoints_own_and_leaves_it_alone(trocr):
    """Sampling is switched off, whatever the checkpoint asks for; nothing of its settings changes."""
    trocr.model.generation_config.do_sample = True
    trocr.model.generation_config.temperature = 5.0
    before = trocr.model.generation_config.to_dict()
    first, second = (explain(trocr, noise(90, 30), None, methods=["cross_attention"]).caption for _ in range(2))
    assert first == second
    assert trocr.model.generation_config.to_dict() == before


def test_a_forced_text_begins_as_the_model_itself_begins(trocr):
    """With the tokenizer's own start token only where the model writes it first."""
    [plain] = prepare(trocr, [noise(90, 30)], [["red car"]]).texts
    assert [plain.special[i] for i in (0, -1)] == [False, True]

    def first_is_start(_module, args, logits):
        logits = logits.clone()
        logits[:, 0, 0] = 99
        return logits

    handle = trocr.model.decoder.output_projection.register_forward_hook(first_is_start)
    [begun] = prepare(trocr, [noise(90, 30)], [["red car"]]).texts
    handle.remove()
    assert begun.ids == (0, *plain.ids)


def test_a_text_too_long_for_the_decoder_is_cut_and_said(trocr):
    found = explain(trocr, noise(90, 30), "man " * 40, methods=["cross_attention"])
    assert any("longer than the model's 24 tokens; cut off:" in w for w in found.warnings)
    assert len(found.entries) - 1 <= models.LIMIT


def test_bytes_of_one_sign_share_its_characters(trocr):
    """Byte-level pieces, also of texts that the tokenizer would cut otherwise, and blanks in front."""
    for text in ("naïve 猫 car", "  red", "👍🏽", "e\u0301a"):
        ids = trocr.tokenizer(text, add_special_tokens=False)["input_ids"]
        found = tokens_of(trocr.tokenizer, [*ids, 1])
        assert found.text == trocr.tokenizer.decode(ids)
        spans = [found.offsets[i] for i in found.visible]
        assert spans == sorted(spans)
        covered = {i for a, b in spans for i in range(a, b)}
        assert covered >= {i for i, c in enumerate(found.text) if c != " "}
        assert all(found.text[a:b].strip() == found.text[a:b] or b - a == 1 for a, b in spans)
    spelled = [trocr.tokenizer.convert_tokens_to_ids(c) for c in "car"]
    assert tokens_of(trocr.tokenizer, spelled).offsets == ((0, 1), (1, 2), (2, 3))
    cat = trocr.tokenizer("猫", add_special_tokens=False)["input_ids"]
    assert len(cat) == 3
    assert tokens_of(trocr.tokenizer, [*spelled, *cat]).offsets[3:] == ((3, 4),) * 3


def test_orthogonal_features_are_noticed_where_they_are(trocr, monkeypatch):
    """Read through a LayerNorm alone: the last block's output, and no other layer; on the fast and the slow way."""
    for patched in (False, True):
        if patched:
            without_shortcuts(monkeypatch, trocr)
        for layer, expected in ((None, True), ("1", False), ("-1.in", False), ("encoder.layernorm", False)):
            found = explain(trocr, noise(90, 30), TEXT, methods=["gradcam"], layers=[layer] if layer else [])
            warnings = [w for w in found.warnings if "<activation, gradient> = 0" in w]
            assert bool(warnings) == expected, (patched, layer)
            assert all("gradcam_ln" in w for w in warnings)
    only = explain(trocr, noise(90, 30), TEXT, methods=["gradcam_ln"])
    assert not any("<activation, gradient>" in w for w in only.warnings)


@pytest.mark.parametrize(
    ("size", "page"), [((600, 800), True), ((700, 500), True), ((400, 60), False), ((30, 28), False)]
)
def test_a_page_is_not_a_line(trocr, size, page):
    found = explain(trocr, noise(*size), TEXT, methods=["cross_attention"])
    assert any("reads one line of text" in w for w in found.warnings) == page


def test_input_of_another_size_than_the_model_was_made_for():
    adapter = models.trocr_adapter(size=(16, 16), patch=8)
    adapter.image_processor.size = {"height": 24, "width": 80}
    found = explain(adapter, noise(90, 30), TEXT)
    assert found.methods["gradcam"].maps.shape[1:] == (3, 10)


def test_targets_of_one_text_that_overlap_get_their_own_backward(trocr):
    """A caption reads the rows that its tokens read: grouped wrongly, their gradients would add up."""
    method = "gradient_x_cross_attention"
    both = explain(trocr, noise(90, 30), TEXT, methods=[method])
    for entry, select in ((0, Selection(tokens=False)), (2, Selection(caption=False, tokens=["car"]))):
        alone = explain(trocr, noise(90, 30), TEXT, methods=[method], select=select)
        assert close(both.methods[method].maps[entry], alone.methods[method].maps[0])


def test_groups_of_targets(trocr):
    assert tracing.disjoint_groups([{1, 2}, {2}, {3}, {1}, set()]) == [[0, 2, 4], [1, 3]]


def test_wrong_models_and_targets_are_refused(trocr):
    swin = SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=2))
    model = VisionEncoderDecoderModel(encoder=swin, decoder=models.decoder("trocr", 32, 40))
    with pytest.raises(ModelError, match=r"encoders of type 'swin' are not supported \(there are: vit, deit\)"):
        TrOcrAdapter(model, tokenizer=models.tokenizer(), image_processor=trocr.image_processor)
    with pytest.raises(ModelError, match="needs a processor"):
        TrOcrAdapter(trocr.model)
    with pytest.raises(TargetError, match="has no token target 'alone'"):
        explain(trocr, noise(90, 30), TEXT, token_target="alone")
    with pytest.raises(OptionError, match="max-length must be a whole number, 1 or more, got 0"):
        Generate(max_length=0)
    silent = models.trocr_adapter(kind="bert")
    silent.model.config.decoder_start_token_id = silent.model.generation_config.decoder_start_token_id = None
    silent.model.generation_config.bos_token_id = silent.model.config.decoder.bos_token_id = None
    with pytest.raises(ModelError, match="does not name the token its decoder starts with"):
        explain(silent, noise(90, 30), TEXT)


def test_models_that_write_nothing_want_a_text(clip, image):
    with pytest.raises(TextError, match="generates no text"):
        explain(clip, image)
    with pytest.raises(TextError, match="a caption must be text, got Generate"):
        explain(clip, image, Generate())


def test_hooks_around_a_shortcut_are_run_and_not_skipped(clip, image):
    """A hook on a module that the shortcut's parts lie in would be skipped by it, but not by the score."""
    cases = (
        (models.trocr_adapter(), "encoder", "last_hidden_state"),
        (models.flava_adapter(kind="logit"), "flava.multimodal_model", "last_hidden_state"),
        (clip, "vision_model", "pooler_output"),
    )
    for adapter, path, field in cases:
        assert shortcut(adapter)

        def double(_module, _args, out, field=field):
            out[field] = 2 * out[field]
            return out

        handle = adapter.model.get_submodule(path).register_forward_hook(double)
        assert not shortcut(adapter)
        handle.remove()
        assert shortcut(adapter)


def test_what_was_not_written_is_no_question_for_models_that_compare(clip, image):
    for select in (Selection(where="blue", tokens=["red"]), Selection(contrast=("red", "blue"))):
        with pytest.raises(OptionError, match="clip generates no text"):
            explain(clip, image, TEXT, select=select)
    with pytest.raises(OptionError, match="cannot be combined with words or phrases"):
        Selection(where="blue", words=True)


def test_a_token_against_itself_is_no_contrast(trocr):
    with pytest.raises(TextError, match="'red' and 'red' are the same token"):
        explain(trocr, noise(90, 30), TEXT, select=Selection(contrast=("red", "red")))


def test_layers_of_the_text_alone_hold_no_patches(trocr):
    """Not even where a text happens to have as many tokens as the image."""
    for adapter, layer in ((trocr, "decoder:0"), (models.flava_adapter(kind="logit"), "text:0")):
        with pytest.raises(LayerError, match="has text tokens only"):
            explain(adapter, noise(90, 30), "a b c d e f g h i j", methods=["gradcam"], layers=[layer], target="logit")


def test_a_forced_text_without_room_for_its_end_names_what_is_cut(trocr):
    from tokenizers import processors

    trocr.generator.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    found = explain(trocr, noise(90, 30), "man" + " man" * 23, methods=["cross_attention"], select=TOKENS)
    assert len(found.entries) == models.LIMIT
    assert any("cut off: 'man'" in w for w in found.warnings)


def test_a_sign_the_model_cannot_name_is_part_of_what_it_read():
    tokenizer = models.bert_tokenizer()
    ids = tokenizer("red \u732b car", add_special_tokens=False)["input_ids"]
    assert tokens_of(tokenizer, [*ids, tokenizer.sep_token_id]).text == "red [UNK] car"


def test_a_module_that_is_switched_on_gives_its_caller_what_it_asked_for(trocr):
    """Weights are taken out of the output again: whoever called for none gets None in their place."""
    flava = models.flava_adapter(kind="matching")
    for adapter, stack in ((trocr, "cross"), (flava, "fusion")):
        seen, inputs = [], prepare(adapter, [noise(90, 30)], [[TEXT]])
        module = adapter.model.get_submodule(structure(adapter).stacks[stack].attention[0])
        handle = module.register_forward_hook(lambda _module, _args, out, seen=seen: seen.append(out[1:]))
        attentions(adapter, inputs, stack)
        handle.remove()
        assert seen == [(None,)]
