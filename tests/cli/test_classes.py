"""Commands on image classifiers: choice of classes, several images, crops."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from grounding import Explanation, explain
from grounding.core.images import open_image
from tests.support import models
from tests.support.images import noise
from tests.support.tolerances import TUTORIAL, close


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "tiny-resnet"
    adapter = models.classifier_adapter(dtype=torch.float32)
    adapter.model.save_pretrained(folder)
    adapter.image_processor.save_pretrained(folder)
    return folder


def test_the_predicted_class_and_the_five_most_probable(ground, photo, checkpoint, tmp_path):
    code, out, err = ground("--image", photo, "--model", checkpoint)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "target class, predicted by the model" in lines[0]
    assert lines[1].split()[:4] == ["entry", "kind", "score", "p"]
    place = lines.index(next(line for line in lines if line.startswith("most probable")))
    top = lines[place + 2 : place + 7]
    assert all(line.rstrip().endswith("%") for line in top)
    assert lines[place + 7] == ""
    document = json.loads((tmp_path / "outputs/photo-tiny-resnet/explanation.json").read_text())
    assert [entry["kind"] for entry in document["entries"]] == ["class"]
    assert document["caption"] == ""
    chances = [
        document["entries"][0]["probability"],
        *(a["probability"] for a in document["entries"][0]["alternatives"]),
    ]
    assert len(chances) == 5
    assert chances == sorted(chances, reverse=True)


def test_classes_by_name_and_index(ground, photo, checkpoint):
    code, out, _ = ground(
        "--image", photo, "--model", checkpoint, "--target-class", "white shark", "--target-class", "1", "--write"
    )
    assert code == 0
    assert "great white shark" in out
    assert [line.split("  ")[0] for line in out.splitlines()[3:5]] == ["great white shark, white shark,…", "two dogs"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--target-class", "hamerhead"], "has no class 'hamerhead' (it has 9: 'a man in a red jacket'"),
        (["--target-class", "two dog"], "did you mean 'two dogs'?"),
        (["--target-class", "9"], "no class 9: its 9 classes are 0 to 8"),
        (["--target", "similarity"], "has no class 'similarity'"),
        (["--methods", "rollout"], "it has none whose weights span the image"),
        (["--words"], "a class has no tokens, words or phrases"),
        (["--caption", "a dog"], "has no class 'a dog'"),
    ],
)
def test_requests_that_a_classifier_cannot_answer_are_errors(ground, photo, checkpoint, argv, message):
    code, out, err = ground("--image", photo, "--model", checkpoint, *argv)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_layers_of_a_classifier(ground, photo, checkpoint):
    code, out, _ = ground("--image", photo, "--model", checkpoint, "--list-layers")
    assert code == 0
    assert "resnet.encoder.stages.2" in out
    assert "1 x 16 x 4 x 6" in out


def test_several_images_share_one_figure(ground, tmp_path, checkpoint):
    for number, size in enumerate([(120, 80), (60, 100)]):
        noise(*size, number).save(tmp_path / f"{number}.png")
    argv = ["--image", tmp_path / "0.png", tmp_path / "1.png", "--model", checkpoint, "--target-class", "1"]
    code, out, _ = ground(*argv)
    assert code == 0
    assert out.splitlines()[-1].endswith("outputs/together-tiny-resnet/figure.png")
    assert (tmp_path / "outputs/together-tiny-resnet/figure.png").is_file()
    code, out, _ = ground(*argv, "--output", "out", "--scale", "caption")
    assert "out/together/figure.png" in out
    code, out, _ = ground(*argv, "--write", "json")
    assert "together" not in out


def test_a_crop_is_the_image(ground, tmp_path, photo, checkpoint):
    """Model input, overlay and positions are those of the crop; the stored result can be drawn again."""
    code, _, err = ground(
        "--image", photo, "--model", checkpoint, "--target-class", "1", "--crop", "30,10,90,70", "--output", "out"
    )
    assert code == 0
    assert "cropped to 30,10,90,70 of 120 x 80 pixels; positions are those of the crop" in err
    again = Explanation.load(tmp_path / "out")
    with Image.open(photo) as whole:
        part = whole.convert("RGB").crop((30, 10, 90, 70))
    assert np.array_equal(np.asarray(again.image.pil), np.asarray(part))
    assert (again.geometry.width, again.geometry.height, again.image.crop) == (60, 60, (30, 10, 90, 70))
    expected = explain(models.classifier_adapter(dtype=torch.float32), part, target=1)
    assert close(again.methods["gradcam"].maps, expected.methods["gradcam"].maps, TUTORIAL)
    again.figure()
    assert open_image(photo, crop=(0, 0, 120, 80)).crop == (0, 0, 120, 80)


def test_a_crop_outside_one_image_fails_for_that_image_only(ground, photo, checkpoint, tmp_path):
    small = tmp_path / "small.png"
    noise(30, 30).save(small)
    argv = ["--image", small, photo, "--model", checkpoint, "--crop", "0,0,60,60", "--format", "json", "--write"]
    code, out, err = ground(*argv)
    assert code == 2
    assert err.startswith("error: ")
    assert "small.png" in err
    refused, explained = json.loads(out)
    assert refused["status"] == "failed_input"
    assert explained["image"]["crop"] == [0, 0, 60, 60]
