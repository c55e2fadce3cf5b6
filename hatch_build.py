"""Build hook: the default model and picture travel inside the wheel. An editable install reads them from data/."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TRAVELS = {
    "data/demo/models/clip": "grounding/_demo/models/clip",
    "data/demo/default.jpg": "grounding/_demo/default.jpg",
}


class DemoHook(BuildHookInterface):
    """Adds the files to a real wheel only: in an editable install a copy would go stale."""

    def initialize(self, version, build_data):
        """Called by hatchling before the wheel is written."""
        if version != "editable":
            build_data["force_include"].update(TRAVELS)
