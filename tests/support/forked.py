"""Run `ground_flickr30k.py` repeatedly, each time in a fork of one process that has imported everything.

A request is a line of JSON on stdin: `argv`, `out` and `err` (files), `die` (fault point, number), `worker` (number)
and `after` (seconds). The process prints `pid` and the fork's id, then `exit` and its exit code. The fork kills itself
with SIGKILL at the given call of the fault point (see FAULT_POINTS), or after so many seconds; when it submits the
given image for decoding, it kills a decode worker.
"""

import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "ground_flickr30k.py"


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def nth(owner, name, number, act, *, after=False):
    """Call `act` at call number `number` of `owner.name`: before it, or after it."""
    real, calls = getattr(owner, name), []

    def called(*args, **options):
        calls.append(1)
        if len(calls) == number and not after:
            act(*args)
        made = real(*args, **options)
        if len(calls) == number and after:
            act(*args)
        return made

    setattr(owner, name, called)


def kill_worker(decoders, *_):
    """Kill a decode worker, as soon as one exists."""
    while not (pids := decoders.pids):
        time.sleep(0.001)
    os.kill(pids[0], signal.SIGKILL)


# Fault point -> (module or "script", name of a public function in it, whether to die after the call).
FAULT_POINTS = {
    "load": ("script", "load", True),
    "begin": ("grounding.batch.config", "write_manifest", False),
    "decode": ("grounding.batch.shards", "ImageJob", False),  # an image was decoded
    "explain": ("grounding.batch.explainer:BatchExplainer", "rows", True),
    "share": ("grounding.batch.shards", "deduplicate_shared_maps", True),
    "table": ("grounding.batch.run_folder", "write_whole", False),
    "written": ("pathlib:Path", "replace", False),
    "renamed": ("grounding.batch.run_folder", "write_whole", True),
    "finish": ("grounding.batch.run_folder:RunFolder", "finish", False),
}


def arm(script, point, number):
    """Die at call number `number` of a fault point."""
    place, name, after = FAULT_POINTS[point]
    module, _, cls = place.partition(":")
    owner = script if place == "script" else importlib.import_module(module)
    nth(getattr(owner, cls) if cls else owner, name, number, die, after=after)


def child(script, request):
    """Run the command in this process, and exit."""
    from grounding.batch.decode_pool import Decoders

    os.setsid()
    # As from a terminal: background jobs of a shell, and their children, ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, handle in (("out", 1), ("err", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
    if request.get("die"):
        arm(script, *request["die"])
    if request.get("worker"):
        nth(Decoders, "submit", request["worker"], kill_worker, after=True)
    if request.get("after"):
        threading.Timer(request["after"], die).start()
    sys.argv = [str(SCRIPT), *request["argv"]]
    sys.exit(script.main(request["argv"]))


def main():
    """Run requests until stdin ends."""
    for name in ("adapters.clip.adapter", "grounding.cli.batch", "grounding.batch.run", "grounding.batch.shards"):
        importlib.import_module(name)

    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            child(script, json.loads(line))
        print("pid", pid, flush=True)
        print("exit", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
