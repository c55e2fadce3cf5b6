"""Where the embedded model and pictures are: in a checkout under data/demo, in an installed wheel beside this file."""

from __future__ import annotations

from pathlib import Path

# How the embedded model is called in results, wherever its files lie.
DEMO_NAME = "demo-clip"
_PACKAGED = Path(__file__).parent / "_demo"
_CHECKOUT = Path(__file__).parent.parent / "data" / "demo"


def demo_folder() -> Path:
    """The folder of the demo world."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def demo_model(name: str = "clip") -> Path:
    """The folder of a demo checkpoint; the default model is `clip`."""
    return demo_folder() / "models" / name


def demo_picture() -> Path:
    """The default picture: a scene with a man in a red jacket among near-misses."""
    return demo_folder() / "default.jpg"


def is_demo(path: str | Path | None) -> bool:
    """Whether a picture or model file belongs to the demo world."""
    return path is not None and Path(path).resolve().is_relative_to(demo_folder().resolve())
