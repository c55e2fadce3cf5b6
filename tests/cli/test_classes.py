"""Classes at the command line: which one, on several pictures, on a part of them; and their figure."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from grounding import Explanation, explain
from grounding.core.errors import OptionError
from grounding.core.images import open_image
from grounding.explanation.figures.class_comparison import figure
from tests.conftest import noise
from tests.explanation.figures.test_wording import said
from tests.support import models
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
    ("argv", "words"),
    [
        (["--target-class", "hamerhead"], "has no class 'hamerhead' (it has 9: 'a man in a red jacket'"),
        (["--target-class", "two dog"], "did you mean 'two dogs'?"),
        (["--target-class", "9"], "no class 9: its 9 classes are 0 to 8"),
        (["--target-class", "1", "--target", "similarity"], "--target-class goes with the target class"),
        (["--target", "similarity"], "has no class 'similarity'"),
        (["--methods", "rollout"], "it has none whose weights span the picture"),
        (["--words"], "a class has no tokens, words or phrases"),
        (["--caption", "a dog"], "has no class 'a dog'"),
        (["--crop", "0,0,500,10"], "crop 0,0,500,10 is no part of a picture of 120 x 80 pixels"),
        (["--crop=-1,0,5,10"], "is no part of"),
        (["--crop", "5,5,5,10"], "is no part of"),
        (["--crop", "a,b,c,d"], "expected four whole numbers X0,Y0,X1,Y1, got 'a,b,c,d'"),
    ],
)
def test_what_does_not_exist_ends_with_2_and_one_line(ground, photo, checkpoint, argv, words):
    code, out, err = ground("--image", photo, "--model", checkpoint, *argv)
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]


def test_classes_are_asked_of_classifiers_alone(ground, photo):
    code, _, err = ground("--image", photo, "--caption", "a dog", "--target-class", "dog")
    assert code == 2
    assert "clip has targets similarity and no classes, got ['dog']" in err


def test_layers_of_a_classifier(ground, photo, checkpoint):
    code, out, _ = ground("--image", photo, "--model", checkpoint, "--list-layers")
    assert code == 0
    assert "resnet.encoder.stages.2" in out
    assert "1 x 16 x 4 x 6" in out


def test_several_images_stand_in_one_figure(ground, tmp_path, checkpoint):
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
    """Model, overlay and positions are those of the crop, and the result says so and can be drawn again."""
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


def test_the_joint_figure_says_what_is_where():
    adapter = models.classifier_adapter()
    images = [noise(90, 60, 1), noise(40, 120, 2)]
    both = [explain(adapter, p, target=[1, 2], methods=["gradcam", "hirescam"]) for p in images]
    made = figure(both, grid=True, scale="caption")
    words = said(made)
    for part in ("2 pictures", "two dogs", "red car", "Grad-CAM", "HiResCAM", "Score of a class: its logit"):
        assert part in words
    limits = {line for line in words.splitlines() if line.startswith("scale ")}
    names = [image.get_gid() for image in made.axes[0].images]
    assert names.count("picture") == 2  # beside its first class
    assert [name for name in names if name.startswith("overlay")].count("overlay:hirescam:1") == 2
    assert len(limits) <= 2  # one range per method, over all pictures
    with pytest.raises(OptionError, match="nothing to draw"):
        figure([])
    with pytest.raises(OptionError, match="different columns cannot stand in one figure"):
        figure([both[0], explain(adapter, images[1], target=1)])
    with pytest.raises(OptionError, match="no figure option 'colour'"):
        figure(both, colour="red")


def test_a_crop_that_one_image_does_not_have_costs_that_image(ground, photo, checkpoint, tmp_path):
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


def test_layers_may_be_numbers():
    adapter = models.classifier_adapter(dtype=torch.float32)
    found = explain(adapter, noise(40, 40), methods=["gradcam"], layers=[-1, 0])
    assert list(found.methods) == ["gradcam@-1", "gradcam@0"]


def test_several_classes_have_no_score_in_common():
    adapter = models.classifier_adapter(dtype=torch.float32)
    assert explain(adapter, noise(40, 40), target=1).score is not None
    assert explain(adapter, noise(40, 40), target=[1, 2]).score is None


def test_warnings_of_a_joint_figure_name_their_images():
    adapter = models.classifier_adapter(dtype=torch.float32)
    found = explain(adapter, [noise(40, 40, seed) for seed in range(5)], target=1)
    paths = ["one.jpg", "two.jpg", "three.jpg", "four.jpg", "five.jpg"]
    own = [("all",), ("all", "some"), ("all", "some"), ("all", "some", "x"), ("all", "some")]
    named = [
        replace(one, image=replace(one.image, path=path), warnings=texts)
        for one, path, texts in zip(found, paths, own, strict=True)
    ]
    words = said(figure(named))
    assert "Warning: all Warning: two.jpg, three.jpg, four.jpg and 1 more: some Warning: four.jpg: x" in words
    many = [replace(one, warnings=tuple(f"w{i}" for i in range(9))) for one in named]
    assert "Warning: w4 Warning: and 4 more" in said(figure(many))
