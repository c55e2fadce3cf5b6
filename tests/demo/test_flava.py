"""The demo FLAVA: its tokens, its training pairs, its warm start, and the shipped checkpoint."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, FlavaForPreTraining, FlavaModel

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data/demo/models/flava"


@pytest.fixture(scope="module")
def model():
    return FlavaForPreTraining.from_pretrained(FOLDER, dtype=torch.float32).eval()


def scenes(count=40):
    from scripts.demo.scenes.world import sample_scene

    rng = random.Random(4)
    return [sample_scene(rng, 1 + number % 4) for number in range(count)]


def test_words_have_the_ids_of_the_tokenizer():
    from scripts.demo.flava.batches import text_without_image
    from scripts.demo.flava.text import WORD_IDS, build_tokenizer

    tokenizer, names = build_tokenizer(), {index: word for word, index in WORD_IDS.items()}
    for seed in range(50):
        words, entities = text_without_image(random.Random(seed))
        text = " ".join(names[word] for word in words.ids[1:-1])
        assert tokenizer(text)["input_ids"] == list(words.ids)
        spoken = {owner for owner in words.owner if owner >= 0}
        assert len(words.owner) == len(words.ids)
        assert spoken == set(range(len(entities)))
        assert words.owner[0] == words.owner[-1] == -1
    assert tokenizer.tokenize("A man in [MASK] jacket") == ["a", "man", "in", "[MASK]", "jacket"]


def test_rows_say_what_is_true():
    from scripts.demo.flava.rows import make_rows

    drawn = scenes()
    rows = make_rows(drawn, hard=0.5, rng=random.Random(0))
    assert set(rows.match.tolist()) == {0, 1, -100}
    for row in range(len(rows.ids)):
        asked = rows.entities[row][rows.in_phrase[row]]  # (tokens, 4)
        if rows.match[row] == 1:
            assert asked.any(-1).all()
        if rows.match[row] == 0:
            assert not asked.any(-1).all()
        assert (rows.labels[row] != -100).any() == (rows.match[row] == -100)
    counts = torch.tensor([len(scene.entities) for scene in drawn])[rows.image]
    beyond = torch.arange(4) >= counts[:, None]
    assert not (rows.entities & beyond[:, None]).any()


def test_masking_hides_a_content_word_and_keeps_it_as_label():
    from scripts.demo.flava.batches import masked, phrase_words
    from scripts.demo.flava.text import CONTENT_IDS, MASK
    from scripts.demo.scenes.vocabulary import Entity

    for seed in range(20):
        rng = random.Random(seed)
        words = phrase_words(Entity("man", "red", "jacket"), 0, rng)
        ids, labels = masked(words, 0.25, rng)
        hidden = [place for place, label in enumerate(labels) if label != -100]
        assert any(labels[place] in CONTENT_IDS for place in hidden)
        assert all(ids[place] == MASK and labels[place] == words.ids[place] for place in hidden)
        assert all(ids[place] == words.ids[place] for place in range(len(ids)) if place not in hidden)


def test_the_warm_start_resembles_the_clip():
    from scripts.demo.flava.batches import make_images
    from scripts.demo.flava.model import build_model, start_from_clip

    clip = CLIPModel.from_pretrained(ROOT / "data/demo/models/clip", dtype=torch.float32).eval()
    pixels = make_images(-2, 8).normalised()
    fresh = build_model().eval()
    start_from_clip(fresh, clip, pixels)
    with torch.no_grad():
        own = fresh.flava.image_model(pixel_values=pixels).last_hidden_state[:, 0]
        wanted = clip.vision_model(pixel_values=pixels).pooler_output
    assert torch.cosine_similarity(own, wanted).mean() > 0.9


def test_leaving_patches_out_keeps_boxes_and_patches_together():
    from scripts.demo.flava.batches import make_images
    from scripts.demo.flava.losses import WordPatchHead, fused_step
    from scripts.demo.flava.model import build_model
    from scripts.demo.flava.rows import make_rows

    torch.manual_seed(0)
    pictures = make_images(-3, 3)
    rows = make_rows(pictures.scenes, hard=0.0, rng=random.Random(0))
    step = fused_step(build_model().eval(), WordPatchHead(), pictures, rows, kept=0.5)
    assert step.inside.shape == (12, rows.ids.shape[1], 98)
    assert step.states.shape[1] == 2 + 98 + rows.ids.shape[1]
    assert step.patches.stop == step.words.start == 100


def test_the_shipped_folder_loads_everywhere():
    for kind in (FlavaForPreTraining, FlavaModel):
        _, report = kind.from_pretrained(FOLDER, output_loading_info=True)
        assert not report["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer("man")["input_ids"][0] == tokenizer.cls_token_id
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    pixels = AutoImageProcessor.from_pretrained(FOLDER)(Image.new("RGB", (320, 200)), return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 112, 112)
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4.2e6


def test_the_shipped_model_matches_words_and_pictures(model):
    inputs = AutoTokenizer.from_pretrained(FOLDER)(
        ["man in red jacket", "woman in green hat", "a [MASK] in a red jacket"], padding=True, return_tensors="pt"
    )
    picture = Image.open(ROOT / "data/demo/default.jpg").convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(FOLDER)(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(
            input_ids=inputs["input_ids"],
            input_ids_masked=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=pixels.expand(3, -1, -1, -1),
            return_loss=False,
        )
    margin = output.itm_logits[:, 1] - output.itm_logits[:, 0]
    assert margin[0] > 0 > margin[1]
    similarity = output.contrastive_logits_per_image[0]
    assert similarity[0] > similarity[1]
    place = (inputs["input_ids"][2] == 4).nonzero().item()
    guess = output.mmm_text_logits[2, place].argmax().item()
    assert guess in AutoTokenizer.from_pretrained(FOLDER).convert_tokens_to_ids(["man", "woman"])
