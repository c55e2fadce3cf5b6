"""Random images, images as encoded bytes, and the errors that broken ones must raise."""

import io
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from grounding.core.images import ImageError, open_image


def noise(width=80, height=60, seed=0):
    """An image of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def open_bytes(data, **options):
    return open_image(io.BytesIO(data), **options)


@contextmanager
def refused(status, message):
    """Like pytest.raises, for an ImageError of this status that is one line, safe to print."""
    with pytest.raises(ImageError, match=message) as caught:
        yield caught
    assert caught.value.status == status
    assert str(caught.value).isprintable()
