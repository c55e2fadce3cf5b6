"""The figure that compares classes on several images."""

from dataclasses import replace

import pytest
import torch

from grounding import explain
from grounding.core.errors import OptionError
from grounding.explanation.figures.class_comparison import figure
from tests.support import models
from tests.support.figures import text_of
from tests.support.images import noise


def test_it_names_images_classes_methods_and_scores():
    adapter = models.classifier_adapter()
    images = [noise(90, 60, 1), noise(40, 120, 2)]
    both = [explain(adapter, p, target=[1, 2], methods=["gradcam", "hirescam"]) for p in images]
    made = figure(both, grid=True, scale="caption")
    words = text_of(made)
    for part in ("2 images", "two dogs", "red car", "Grad-CAM", "HiResCAM", "Score of a class: its logit"):
        assert part in words
    limits = {line for line in words.splitlines() if line.startswith("scale ")}
    names = [image.get_gid() for image in made.axes[0].images]
    assert names.count("image") == 2  # beside its first class
    assert [name for name in names if name.startswith("overlay")].count("overlay:hirescam:1") == 2
    assert len(limits) <= 2  # one range per method, over all pictures
    with pytest.raises(OptionError, match="nothing to draw"):
        figure([])
    with pytest.raises(OptionError, match="different methods cannot share a figure"):
        figure([both[0], explain(adapter, images[1], target=1)])
    with pytest.raises(OptionError, match="no figure option 'colour'"):
        figure(both, colour="red")


def test_warnings_name_their_images():
    adapter = models.classifier_adapter(dtype=torch.float32)
    found = explain(adapter, [noise(40, 40, seed) for seed in range(5)], target=1)
    paths = ["one.jpg", "two.jpg", "three.jpg", "four.jpg", "five.jpg"]
    own = [("all",), ("all", "some"), ("all", "some"), ("all", "some", "x"), ("all", "some")]
    named = [
        replace(one, image=replace(one.image, path=path), warnings=texts)
        for one, path, texts in zip(found, paths, own, strict=True)
    ]
    words = text_of(figure(named))
    assert "Warning: all Warning: two.jpg, three.jpg, four.jpg and 1 more: some Warning: four.jpg: x" in words
    many = [replace(one, warnings=tuple(f"w{i}" for i in range(9))) for one in named]
    assert "Warning: w4 Warning: and 4 more" in text_of(figure(many))
