"""Architectures with CLIP's image encoder (MetaCLIP 2, Chinese-CLIP, AltCLIP): scores, maps, texts, checkpoints."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from adapters import ADAPTERS, ClipAdapter, load
from grounding import Selection, explain
from grounding.adapter.recorder import Recorder
from grounding.core.errors import TextError
from grounding.engine.queries import prepare
from grounding.engine.signals import pooled_gradient
from tests.support import batch
from tests.support.clip_kin import KIN, LIMIT, kin_adapter
from tests.support.commands import ROOT, answer, script
from tests.support.images import noise
from tests.support.models import FACTORIES
from tests.support.oracles import vision
from tests.support.tolerances import ORACLE, SOON, TUTORIAL, close

CAPTIONS = {
    "MetaClip2Model": "a man in a red jacket",
    "ChineseCLIPModel": "一只红色的狗 blue car",
    "AltCLIPModel": "红色的汽车 and two dogs",
}


@pytest.fixture(params=sorted(KIN))
def kind(request):
    return request.param


@pytest.fixture
def adapter(kind):
    return kin_adapter(kind)


@pytest.fixture
def caption(kind):
    return CAPTIONS[kind]


def pixel_values(adapter, image):
    return adapter.image_processor(image, return_tensors="pt")["pixel_values"].to(adapter.dtype)


def prepared(adapter, *captions):
    """Two images, the first with one caption and the second with all of them; their targets."""
    inputs = prepare(adapter, [noise(90, 60), noise(50, 70, 3)], [list(captions[:1]), list(captions)])
    return inputs, [[text.caption(), *text.tokens()] for text in inputs.texts]


# ---------------------------------------------------------------- scores


def test_logits_of_a_padded_batch_are_the_models_own(adapter, caption):
    """A user's call of the model: texts of two lengths, padded by the tokenizer."""
    images, texts = [noise(90, 60), noise(50, 70, 3)], [caption, "red car"]
    encoded = adapter.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = torch.cat([pixel_values(adapter, image) for image in images])
    with torch.no_grad():
        expected = adapter.model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], pixel_values=pixels
        ).logits_per_image
    found = explain(adapter, images, [texts, texts], methods=["rollout"], target="logits")
    scores = [[explanation.score for explanation in own] for own in found]
    assert close(scores, expected, ORACLE)


def test_a_token_is_scored_by_the_mask_without_it(adapter, caption, image):
    with torch.no_grad():
        embedded = adapter.model.get_image_features(pixel_values(adapter, image)).pooler_output[0]
    embedded = embedded / embedded.norm()
    text = prepare(adapter, [image], [[caption]]).texts[0]
    whole = vision.text_embedding(adapter.model, adapter.tokenizer, caption)
    found = explain(adapter, image, caption, methods=["rollout"])
    expected = [whole @ embedded] + [
        (whole - vision.text_embedding(adapter.model, adapter.tokenizer, caption, [i])) @ embedded for i in text.visible
    ]
    assert close([entry.score for entry in found.entries], torch.stack(expected))


def test_alone_is_a_text_of_its_own(adapter, image):
    with torch.no_grad():
        embedded = adapter.model.get_image_features(pixel_values(adapter, image)).pooler_output[0]
    embedded = embedded / embedded.norm()
    select = Selection(words=True)
    found = explain(adapter, image, "red car", methods=["rollout"], token_target="alone", select=select)
    assert [entry.label for entry in found.entries] == ["red car", "red", "car"]
    expected = [
        vision.text_embedding(adapter.model, adapter.tokenizer, text) @ embedded for text in ("red car", "red", "car")
    ]
    assert close([entry.score for entry in found.entries], torch.stack(expected))


def test_norm_is_the_length_of_the_image_embedding(adapter, image):
    found = explain(adapter, image, target="norm", methods=["gradcam"])
    pixels = pixel_values(adapter, image)
    kept = []
    block = adapter.model.vision_model.encoder.layers[-1].layer_norm1
    handle = block.register_forward_hook(lambda module, args, out: kept.append(out))
    length = adapter.model.get_image_features(pixels).pooler_output[0].norm()
    handle.remove()
    [gradient] = torch.autograd.grad(length, kept[0])
    assert close(found.score, length.item())
    expected = vision.gradcam(kept[0][0, 1:].detach().numpy(), gradient[0, 1:].numpy())
    assert close(found[0].raw.ravel(), expected)


# ---------------------------------------------------------------- maps


def test_gradcam_equals_the_plain_loop(adapter, caption, image):
    """A full backward pass of the whole model for the caption and for each token."""
    found = explain(adapter, image, caption, methods=["gradcam"])
    text = prepare(adapter, [image], [[caption]]).texts[0]
    whole = vision.text_embedding(adapter.model, adapter.tokenizer, caption)
    left = [vision.text_embedding(adapter.model, adapter.tokenizer, caption, [i]) for i in text.visible]
    tutorial = vision.Tutorial(adapter.model, pixel_values(adapter, image))
    assert len(found.entries) == 1 + len(left)
    for map_, seed in zip(found, [whole, *(whole - other for other in left)], strict=True):
        score, features, gradient, _ = tutorial.run(seed, adapter.structure("similarity").default_layer)
        assert map_.entry.score == pytest.approx(score, abs=1e-6)
        assert close(map_.raw.ravel(), vision.gradcam(features[1:], gradient[1:]))


@pytest.mark.parametrize("rule", [None, "layernorm"])
@pytest.mark.parametrize("target", ["similarity", "logits", "norm"])
def test_the_shortcut_equals_the_slow_reference(adapter, caption, target, rule):
    inputs, spans = prepared(adapter, caption, "red car")
    targets = adapter.targets(inputs, spans, target)
    shortcut = adapter.shortcut(target)
    assert len(shortcut.layers) == 2
    for layer, others in shortcut.layers.items():
        with Recorder(adapter.model, dict.fromkeys([layer, *others], False)) as recorder:
            adapter.encode_images(inputs.images)
        found = shortcut.pooled_gradient(layer, inputs, targets, recorder.outputs, rule)
        assert close(found, pooled_gradient(adapter, inputs, targets, layer, rule))


def test_a_modified_text_block_is_run_and_not_recomputed(adapter, caption, image):
    """Where the causal prefix is shared, a hook of the user must still have its effect."""
    before = explain(adapter, image, caption, methods=["rollout"])
    names = [name for name, _ in adapter.model.text_model.named_modules()]
    [last] = [name for name in names if name.endswith(("1.self_attn", "1.attention.self"))]
    attention = adapter.model.text_model.get_submodule(last)
    attention.register_forward_hook(lambda module, args, out: (0.3 * out[0], *out[1:]))
    after = explain(adapter, image, caption, methods=["rollout"])
    with torch.no_grad():
        embedded = adapter.model.get_image_features(pixel_values(adapter, image)).pooler_output[0]
    embedded = embedded / embedded.norm()
    whole, left = (
        vision.text_embedding(adapter.model, adapter.tokenizer, caption, hidden) @ embedded for hidden in ([], [1])
    )
    assert close([after.entries[0].score, after.entries[1].score], torch.stack([whole, whole - left]))
    assert abs(after.entries[1].score - before.entries[1].score) > 1e-3 * abs(before.entries[1].score)


def test_a_batch_of_unequal_images_and_texts_equals_one_by_one(adapter, caption):
    images, texts = [noise(90, 60), noise(40, 75, 5)], [[caption, "red car"], ["two dogs on green grass"]]
    methods = ["gradcam", "gradcam_ln", "rollout", "relevance"]
    together = explain(adapter, images, texts, methods=methods)
    for image, own, found in zip(images, texts, together, strict=True):
        for text, one in zip(own, found, strict=True):
            single = explain(adapter, image, text, methods=methods)
            assert one.geometry == single.geometry
            assert close([e.score for e in one.entries], [e.score for e in single.entries])
            for method in methods:
                assert close(one.methods[method].maps, single.methods[method].maps), method


@pytest.mark.parametrize("size", [(200, 120), (97, 211), (64, 64), (250, 70)])
def test_cells_lie_where_the_processor_puts_them(adapter, size):
    """Ramps through the real image processor: the mean over each patch is its position in the image."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    ramp = adapter.image_processor(image, return_tensors="np", do_normalize=False, do_rescale=False)["pixel_values"][0]
    geometry = adapter.prepare_images([image]).geometry(0)
    rows, columns = geometry.rows, geometry.columns
    cells = ramp.reshape(3, rows, 8, columns, 8).mean(axis=(2, 4))[:2] + 0.5
    centres = np.array([[geometry.cell_centre(r, c) for c in range(columns)] for r in range(rows)])
    cell = np.array(geometry.cell_box(1, 1)).reshape(2, 2)
    off = (np.moveaxis(cells, 0, -1) - centres) / (cell[1] - cell[0])
    inner = slice(1, -1)  # at the borders of the image the resize filter bends a ramp
    assert np.abs(off[inner, inner]).max() < 0.05


def test_an_input_of_another_size_interpolates_the_positions(kind):
    adapter = kin_adapter(kind)
    adapter.image_processor.size = {"shortest_edge": 48}
    adapter.image_processor.crop_size = {"height": 48, "width": 40}
    image = noise(90, 60)
    inputs = adapter.prepare_images([image])
    assert (inputs.geometry(0).rows, inputs.geometry(0).columns) == (6, 5)
    pixels = pixel_values(adapter, image)
    with torch.no_grad():
        expected = adapter.model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        assert close(adapter.encode_images(inputs), expected)


# ---------------------------------------------------------------- texts


def test_chinese_characters_are_tokens_with_their_offsets():
    adapter = kin_adapter("ChineseCLIPModel")
    text = "红色 car, 一只狗"
    [tokens] = prepare(adapter, [noise()], [[text]]).texts
    assert [text[slice(*tokens.offsets[i])] for i in tokens.visible] == ["红", "色", "car", ",", "一", "只", "狗"]
    found = explain(adapter, noise(), text, methods=["rollout"], select=Selection(phrases=["红色", "狗"]))
    phrases = [entry for entry in found.entries if entry.kind == "phrase"]
    assert [(entry.label, entry.start, entry.end) for entry in phrases] == [("红色", 0, 2), ("狗", 10, 11)]
    own = explain(adapter, noise(), "红色", methods=["rollout"])
    assert close(phrases[0].score, own.score)


@pytest.mark.parametrize("kind", ["ChineseCLIPModel", "AltCLIPModel", "MetaClip2Model"])
def test_a_long_text_is_cut_at_the_number_of_positions(kind, image):
    """The tokenizers' own limits are above that of the models; RoBERTa's positions start after the padding token."""
    adapter, text = kin_adapter(kind), "red car " * 20
    assert adapter.tokenizer.model_max_length > LIMIT
    [tokens] = prepare(adapter, [image], [[text]]).texts
    assert len(tokens) == LIMIT
    assert any(f"longer than the model's {LIMIT} tokens" in warning for warning in tokens.warnings)
    with torch.no_grad():
        embedded = adapter.model.get_image_features(pixel_values(adapter, image)).pooler_output[0]
        encoded = adapter.model.get_text_features(torch.tensor([tokens.ids])).pooler_output[0]
    found = explain(adapter, image, text, methods=["rollout"])
    assert close(found.score, torch.nn.functional.cosine_similarity(embedded, encoded, dim=0))


def test_a_text_with_the_end_token_inside_is_refused_where_it_is_pooled_there(image):
    """MetaCLIP 2 reads a text at its first end token, also where that has the id 2; the others at the first token."""
    text = "red </s> car"
    with pytest.raises(TextError, match=r"up to token \d of \d+ only"):
        explain(kin_adapter("MetaClip2Model"), image, text, methods=["rollout"])
    assert explain(kin_adapter("AltCLIPModel"), image, text, methods=["rollout"]).caption == text


def test_the_end_token_of_metaclip_2_has_the_id_2(image):
    """CLIP takes this id for an old configuration, and reads a text at its largest id."""
    adapter = kin_adapter("MetaClip2Model")
    assert adapter.model.text_model.eos_token_id == adapter.tokenizer.eos_token_id == 2
    [tokens] = prepare(adapter, [image], [["red car"]]).texts
    assert tokens.ids[-1] == 2 < max(tokens.ids)


# ---------------------------------------------------------------- checkpoints and commands


@pytest.fixture(scope="module", params=sorted(KIN))
def checkpoint(request, tmp_path_factory):
    """A folder as `save_pretrained` writes it, and its architecture."""
    adapter = kin_adapter(request.param, dtype=torch.float32)
    folder = tmp_path_factory.mktemp(request.param)
    for part in (adapter.model, adapter.tokenizer, adapter.image_processor):
        part.save_pretrained(folder)
    return folder, request.param


def test_every_kin_has_a_line_in_the_table():
    assert set(KIN) <= set(ADAPTERS)
    assert set(KIN) <= set(FACTORIES)
    assert {ADAPTERS[name] for name in KIN} == {ClipAdapter}


@pytest.mark.parametrize("architectures", ["named", "missing"])
def test_a_folder_loads_with_its_own_model_class(checkpoint, architectures, tmp_path):
    folder, kind = checkpoint
    if architectures == "missing":
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        del config["architectures"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        folder = tmp_path
    loaded = load(str(folder), device="cpu")
    assert type(loaded.model).__name__ == kind
    image, text = noise(90, 60), CAPTIONS[kind]
    own = kin_adapter(kind, dtype=torch.float32)
    found, expected = (explain(each, image, text, methods=["gradcam"]) for each in (loaded, own))
    assert [e.label for e in found.entries] == [e.label for e in expected.entries]
    assert close(found.methods["gradcam"].maps, expected.methods["gradcam"].maps, TUTORIAL)


def test_the_command_for_one_image(checkpoint, tmp_path, monkeypatch, capsys):
    folder, kind = checkpoint
    monkeypatch.chdir(tmp_path)
    noise(90, 60).save("photo.png")
    ground = script(ROOT / "scripts" / "ground.py")
    common = ["--model", folder, "--device", "cpu", "--image", "photo.png"]
    code, out, err = answer(ground, [*common, "--caption", CAPTIONS[kind], "--format", "json", "--write"], capsys)
    assert code == 0, err
    document = json.loads(out)
    assert document["entries"][0]["label"] == CAPTIONS[kind]
    assert set(document["entries"][1]["maps"]) == {"gradcam", "rollout", "relevance"}
    code, out, err = answer(ground, [*common, "--list-layers"], capsys)
    assert code == 0, err
    assert "vision_model.encoder.layers.2.layer_norm1" in out


@pytest.mark.slow
def test_a_killed_batch_run_resumes_and_equals_an_uninterrupted_one(tmp_path):
    adapter = kin_adapter("ChineseCLIPModel", dtype=torch.float32)
    model = tmp_path / "model"
    for part in (adapter.model, adapter.tokenizer, adapter.image_processor):
        part.save_pretrained(model)
    data = batch.data(tmp_path / "data", 6, (CAPTIONS["ChineseCLIPModel"], "red car"))
    options = ["--data", data, "--model", model, "--device", "cpu", "--workers", "0", "--threads", "1"]
    options += ["--shard-size", "1", "--batch-size", "2", "--no-tokens"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forked"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    codes = []
    try:
        assert process.stdout.readline() == "ready\n"
        for output, die in (("whole", None), ("killed", ["share", 3]), ("killed", None)):
            files = {name: str(tmp_path / f"{len(codes)}.{name}") for name in ("out", "err")}
            argv = [str(a) for a in [*options, "--output", tmp_path / output]]
            process.stdin.write(json.dumps({"argv": argv, "die": die, **files}) + "\n")
            process.stdin.flush()
            assert process.stdout.readline().startswith("pid ")
            codes.append(int(process.stdout.readline().split()[1]))
    finally:
        process.kill()
        process.communicate(timeout=SOON)
    assert codes == [0, -9, 0], (tmp_path / "2.err").read_text()
    assert "4 images to do in 4 of 6 shards" in (tmp_path / "2.err").read_text()
    assert batch.content(tmp_path / "killed") == batch.content(tmp_path / "whole")
