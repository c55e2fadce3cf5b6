"""Where the embedded model and pictures are: in a checkout under data/demo, in an installed wheel beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# How the embedded model is called in results, wherever its files lie.
DEMO_NAME = "demo-clip"
_PACKAGED = Path(__file__).parents[1] / "_demo"
_CHECKOUT = Path(__file__).parents[2] / "data" / "demo"


def demo_folder() -> Path:
    """The folder of the demo world."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def demo_model(name: str = "clip") -> Path:
    """The folder of a demo checkpoint; the default model is `clip`."""
    return demo_folder() / "models" / name


def demo_image() -> Path:
    """The default picture: a scene with a man in a red jacket among near-misses."""
    return demo_folder() / "default.jpg"


def demo_line() -> Path:
    """The default text line."""
    return demo_folder() / "line.png"


def demo_scenes() -> Path:
    """The scenes: pictures with captions, phrases and boxes."""
    return demo_folder() / "scenes"


def demo_lines() -> Path:
    """The lines of text, with a box for every character."""
    return demo_folder() / "lines"


def data_name(folder: Path) -> str:
    """A data folder as it was given; those of the demo world by a name that is the same on every machine."""
    names = {demo_scenes().resolve(): "demo scenes", demo_lines().resolve(): "demo lines"}
    return names.get(folder.resolve(), str(folder))


def is_demo(path: str | Path | None, parts: Sequence[str] = ("",)) -> bool:
    """Whether a picture or model file belongs to the demo world, or to these parts of it."""
    folder = demo_folder().resolve()
    return path is not None and any(Path(path).resolve().is_relative_to(folder / part) for part in parts)
