"""Image openers that kill, block or break their decode worker. Imports little: every worker imports it, too."""

import os
import signal
import time

from grounding.batch.decode_pool import ImageOpener


class Deadly(ImageOpener):
    """Open images, but kill the process at each one named `deadly`, and the first time at one named `once`."""

    def __call__(self, source):
        seen = source.with_suffix(".seen")
        if source.name.startswith("deadly") or (source.name.startswith("once") and not seen.exists()):
            seen.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(source)


class Unsendable:
    """Kill the process that pickles it, as lack of memory may do while an image is copied to the pipe."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


class DeadlyResult(ImageOpener):
    """Open images, but kill the worker while it sends the result for one named `deadly`."""

    def __call__(self, source):
        return Unsendable() if source.name.startswith("deadly") else super().__call__(source)


class Stuck(ImageOpener):
    """Never return."""

    def __call__(self, source):
        time.sleep(3600)


class Faulty(ImageOpener):
    """Raise an error that is no ImageError."""

    def __call__(self, source):
        raise RuntimeError("a fault in the code")


class Unloadable(ImageOpener):
    """End the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)
