"""Functions that draw, save and load an explanation, by name and imported on first use."""

from grounding.core.registry import Registry

VIEWS = Registry(
    "view",
    {
        "figure": "grounding.explanation.figures.comparison:figure",
        "strip": "grounding.explanation.figures.reading_strip:strip",
        "inspection": "grounding.explanation.figures.inspection:figure",
        "save": "grounding.explanation.storage:save",
        "load": "grounding.explanation.storage:load",
    },
)
