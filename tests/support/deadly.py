"""Pictures that kill who decodes them. Imports next to nothing, as every worker does so, too."""

import os
import signal
import time

from grounding.batch.decode_pool import Opening


class Deadly(Opening):
    """Opens pictures as ever, but one named `deadly` ends its process, and one named `once` does so once."""

    def __call__(self, source):
        seen = source.with_suffix(".seen")
        if source.name.startswith("deadly") or (source.name.startswith("once") and not seen.exists()):
            seen.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(source)


class Unsendable:
    """Kills the process that pickles it, as a lack of memory may do while an image is copied to the pipe."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


class DeadlyResult(Opening):
    """Opens images, but for one named `deadly` the worker is killed while it sends the result."""

    def __call__(self, source):
        return Unsendable() if source.name.startswith("deadly") else super().__call__(source)


class Stuck(Opening):
    """Never comes back."""

    def __call__(self, source):
        time.sleep(3600)


class Faulty(Opening):
    """Has a fault of its own."""

    def __call__(self, source):
        raise RuntimeError("a fault in the code")


class Unloadable(Opening):
    """Ends the process that unpacks it."""

    def __reduce__(self):
        return os._exit, (1,)
