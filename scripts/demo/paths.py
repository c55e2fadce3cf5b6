"""Folders of the demo: shipped data and models, and checkpoints of training runs."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data/demo"
MODELS = DATA / "models"
RUNS = ROOT / "runs/demo"
