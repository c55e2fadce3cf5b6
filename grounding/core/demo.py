"""Paths of the demo models and images: data/demo in a checkout, `grounding/_demo` in an installed wheel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# The name of the default model in results; its path differs from machine to machine.
DEMO_NAME = "demo-clip"
_PACKAGED = Path(__file__).parents[1] / "_demo"
_CHECKOUT = Path(__file__).parents[2] / "data" / "demo"


def demo_folder() -> Path:
    """Return the folder of all demo files."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def demo_model(name: str = "clip") -> Path:
    """Return the folder of a demo checkpoint, such as `clip` (the default model) or `trocr`."""
    return demo_folder() / "models" / name


def demo_image() -> Path:
    """Return the path of the default image: a man in a red jacket among similar figures."""
    return demo_folder() / "default.jpg"


def demo_line() -> Path:
    """Return the path of the default image of a text line."""
    return demo_folder() / "line.png"


def demo_scenes() -> Path:
    """Return the folder of the demo scenes: images with captions, phrases and boxes."""
    return demo_folder() / "scenes"


def demo_lines() -> Path:
    """Return the folder of the demo text lines: images with a box for every character."""
    return demo_folder() / "lines"


def data_name(folder: Path) -> str:
    """Return the name of a data folder: its path as given, for the demo folders a name independent of the machine."""
    names = {demo_scenes().resolve(): "demo scenes", demo_lines().resolve(): "demo lines"}
    return names.get(folder.resolve(), str(folder))


def is_demo(path: str | Path | None, parts: Sequence[str] = ("",)) -> bool:
    """Return whether a path is below the demo folder, or below one of these `parts` of it."""
    folder = demo_folder().resolve()
    return path is not None and any(Path(path).resolve().is_relative_to(folder / part) for part in parts)
