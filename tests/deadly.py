"""Pictures that kill who decodes them. Imports next to nothing, as every worker does so, too."""

import os
import signal

from grounding.decode_ahead import Opening


class Deadly(Opening):
    """Opens pictures as ever, but one named `deadly` ends its process, and one named `once` does so once."""

    def __call__(self, source):
        seen = source.with_suffix(".seen")
        if source.name.startswith("deadly") or (source.name.startswith("once") and not seen.exists()):
            seen.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(source)
