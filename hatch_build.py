"""Build hook: the default models and images are part of the wheel. An editable install reads them from data/."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INCLUDED = {
    "data/demo/models/clip": "grounding/_demo/models/clip",
    "data/demo/models/trocr": "grounding/_demo/models/trocr",
    "data/demo/default.jpg": "grounding/_demo/default.jpg",
    "data/demo/line.png": "grounding/_demo/line.png",
}


class DemoHook(BuildHookInterface):
    """Adds the files to a real wheel only: in an editable install a copy would go stale."""

    def initialize(self, version, build_data):
        """Called by hatchling before the wheel is written."""
        if version != "editable":
            build_data["force_include"].update(INCLUDED)
