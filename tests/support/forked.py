"""Runs `ground_flickr30k.py` again and again, each time in a fork of one process that has everything imported.

A request is a line of JSON on stdin: `argv`, `out` and `err` (files), `die` (moment, number), `worker` (number) and
`after` (seconds). The process answers `pid` with the fork's, then `exit` with its code. At the given occurrence of the
moment, or after so many seconds, the fork kills itself with SIGKILL; at the given picture it kills a decode worker.
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
    """At the call number `number` of `owner.name`, act: before it, or after it."""
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
    """Kill one of the processes that decode, whichever, as soon as there is one."""
    while not (pids := decoders.pids):
        time.sleep(0.001)
    os.kill(pids[0], signal.SIGKILL)


def arm(script, moment, number):
    """Die at that moment."""
    from grounding.batch import config, decode_pool, explainer, run_folder, shards

    owners = {
        "load": (script, "load", True),
        "begin": (config, "write_manifest", False),
        "decode": (decode_pool, "_finished", False),
        "explain": (explainer.BatchExplainer, "_explained", True),
        "share": (shards, "share_maps", True),
        "table": (run_folder, "write_whole", False),
        "written": (Path, "replace", False),
        "renamed": (run_folder, "write_whole", True),
        "finish": (run_folder.RunFolder, "finish", False),
    }
    owner, name, after = owners[moment]
    nth(owner, name, number, die, after=after)


def child(script, request):
    """The command, in this process, which ends with it."""
    from grounding.batch.decode_pool import Decoders

    os.setsid()
    # As from a terminal: a shell's background jobs, and what they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, handle in (("out", 1), ("err", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
    if request.get("die"):
        arm(script, *request["die"])
    if request.get("worker"):
        nth(Decoders, "_submit", request["worker"], kill_worker, after=True)
    if request.get("after"):
        threading.Timer(request["after"], die).start()
    sys.argv = [str(SCRIPT), *request["argv"]]
    sys.exit(script.main(request["argv"]))


def main():
    """Answer requests until there are no more."""
    for name in ("adapters.clip.adapter", "grounding.cli.batch_run", "grounding.batch.run"):
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
