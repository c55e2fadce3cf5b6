"""What is scored, and how: the choices that all evaluations with boxes for phrases share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grounding.core.boxes import Peak
from grounding.core.demo import is_demo
from grounding.core.errors import OptionError
from grounding.evaluation.pointing import OVERLAP, THRESHOLD, Captions
from grounding.evaluation.statistics import CONFIDENCE, RESAMPLES

# Why pictures are left out that have fewer entities than are asked for.
FEW = "min_entities"
DEMO_ENTITIES = 3


@dataclass(frozen=True)
class PointingConfig:
    """`captions`: phrases of the first caption of a picture, or of all. `peak`: see `scoring.read`. `min_entities`:
    pictures need so many chains with boxes (None: 3 in the demo world, where fewer make it easy, else 1). `threshold`:
    where a map's range is cut for its box (None: half). `seed` is for the intervals. Raises OptionError.
    """

    captions: Captions = "first"
    peak: Peak = "patch"
    min_entities: int | None = None
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_entities is not None and self.min_entities < 1:
            raise OptionError(f"min_entities must be at least 1, got {self.min_entities}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise OptionError(f"threshold must be a part of the map's range, above 0 and up to 1, got {self.threshold}")

    def entities(self, folder: Path) -> int:
        """How many chains with boxes a picture of this data set needs."""
        if self.min_entities is not None:
            return self.min_entities
        return DEMO_ENTITIES if is_demo(folder) else 1

    @property
    def cut(self) -> float:
        """The threshold."""
        return THRESHOLD if self.threshold is None else self.threshold

    def described(self) -> dict[str, Any]:
        """Everything that the numbers depend on, in words and values."""
        return {
            "captions": self.captions,
            "min_entities": self.min_entities,
            "peak": self.peak,
            "interpolation": "bilinear" if self.peak == "pixel" else None,
            "iou": OVERLAP,
            "threshold": self.cut,
            "tuned": False,
            "centre": "the centre of the picture",
            "random": f"exact, any seen {self.peak} alike",
            "interval": {"method": "percentile bootstrap over pictures", "resamples": RESAMPLES, "level": CONFIDENCE},
        }
