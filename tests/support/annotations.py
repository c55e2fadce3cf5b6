"""Images with phrases and boxes, as Flickr30k Entities is laid out."""

from tests.support.images import noise


def write_data(folder, images, split="test"):
    """A data set; `images`: name -> phrase -> box (x0, y0, x1, y1), half-open, of a picture of 80 x 80 pixels."""
    for part in ("Images", "Sentences", "Annotations"):
        (folder / part).mkdir(exist_ok=True, parents=True)
    (folder / f"{split}.txt").write_text("\n".join(images))
    for seed, (name, phrases) in enumerate(images.items()):
        noise(80, 80, seed).save(folder / "Images" / f"{name}.png")
        marks = [f"[/EN#{i}/people {phrase}]" for i, phrase in enumerate(phrases, 1)]
        (folder / "Sentences" / f"{name}.txt").write_text(" and ".join(marks) + "\n" + " or ".join(marks) + "\n")
        objects = "".join(
            f"<object><name>{i}</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for i, (x0, y0, x1, y1) in enumerate(phrases.values(), 1)
        )
        size = "<size><width>80</width><height>80</height></size>"
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")


IMAGES = {
    "first": {"A red car": (0, 0, 40, 40), "the man": (40, 40, 80, 80)},
    "second": {"dogs": (20, 20, 60, 60), "a bus": (0, 0, 20, 20), "the man": (60, 60, 80, 80)},
    "third": {"a hat": (0, 20, 20, 40), "a dog": (40, 0, 80, 20)},
}
