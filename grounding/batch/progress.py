"""What a batch run says: progress on stderr, a summary on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grounding.batch.rows import Row
from grounding.batch.run_folder import RunFolder
from grounding.core.printable import escape
from grounding.core.streams import say

# Failures that are printed one by one.
SHOWN = 5
# Between two lines of progress in a log.
LOG_SECONDS = 60


class Progress:
    """What is said while a run goes on; this one says nothing."""

    def begins(self, run: RunFolder, todo: Sequence[int], images: int) -> None:
        """`todo` are the shards of this process, `images` how many are to be computed in them."""

    def damaged(self, path: Path) -> None:
        """A table was set aside and will be computed again."""

    def shard(self, said: dict[str, Any]) -> None:
        """A shard was committed."""


class Meter:
    """How much of something is done, at what rate, and the time left: a bar where stderr is a terminal, else a line a
    minute for the log. `total` may not be known."""

    def __init__(self, total: int | None, unit: str, *, name: str = "", quiet: bool = False, note: str = "") -> None:
        self.total, self.unit, self.name, self.quiet, self.done = total, unit, name, quiet, 0
        self.started = self.told = time.perf_counter()
        shown = not quiet and sys.stderr.isatty()
        self.bar = tqdm(total=total, unit=unit, desc=name or None, postfix=note) if shown else None

    def forward(self, count: int = 1, note: str = "") -> None:
        """So many more are done."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif not self.quiet and (now := time.perf_counter()) - self.told >= LOG_SECONDS:
            self.told = now
            said = {"ncols": 0, "unit": self.unit, "prefix": self.name, "postfix": note}
            say(tqdm.format_meter(self.done, self.total, now - self.started, **said).strip())

    def close(self) -> None:
        """The bar stays as it is."""
        if self.bar is not None:
            self.bar.close()


class ProgressBar(Progress):
    """Pictures done and failed rows. `by_shard`: rows are heard of only when their shard is done."""

    def __init__(self, *, quiet: bool = False, by_shard: bool = False, name: str = "") -> None:
        self.quiet, self.by_shard, self.name = quiet, by_shard, name
        self.failed = 0
        self.meter: Meter | None = None
        self.run: RunFolder | None = None

    def begins(self, run: RunFolder, todo: Sequence[int], images: int) -> None:
        """The bar appears."""
        self.run = run
        done = f"{len(run.shards) - len(todo)} of {len(run.shards)} shards were done"
        self.meter = Meter(images, "picture", name=self.name, quiet=self.quiet, note=done)
        if not self.quiet and self.meter.bar is None:
            left = f"{images} pictures to do in {len(todo)} of {len(run.shards)} shards"
            say(f"{escape(run.path)}: {left}{f' ({self.name})' if self.name else ''}")

    def rows(self, rows: Sequence[Row], images: int) -> None:
        """Rows were computed, and with them so many pictures finished."""
        self.failed += sum(row["status"].startswith("failed") for row in rows)
        self._forward(images)

    def damaged(self, path: Path) -> None:
        """Say so."""
        say(f"warning: a damaged shard was set aside as {escape(path)} and is computed again")

    def shard(self, said: dict[str, Any]) -> None:
        """Where rows are not heard of, this is progress."""
        if self.by_shard and self.run is not None:
            self.failed += sum(n for status, n in said["counts"].items() if status.startswith("failed"))
            self._forward(len(self.run.members(said["shard"])))

    def _forward(self, images: int) -> None:
        if self.meter is not None:
            self.meter.forward(images, f"{self.failed} rows failed" if self.failed else "")

    def close(self) -> None:
        """The bar stays as it is."""
        if self.meter is not None:
            self.meter.close()


def failures(run: RunFolder) -> int:
    """How many rows failed."""
    return sum(count for status, count in run.counts().items() if status.startswith("failed"))


def status_of(run: RunFolder) -> dict[str, Any]:
    """How far a run is: shards, pictures, rows by status, bytes stored and what its maps alone take."""
    said = [one for shard in run.shards if (one := run.said(shard)) is not None]
    images = sum(len(run.members(one["shard"])) for one in said)
    stored, maps = sum(one["bytes"] for one in said), sum(one["maps_bytes"] for one in said)
    return {
        "run": str(run.path),
        "model": run.about.model["id"],
        "shards": {"done": len(said), "of": len(run.shards)},
        "pictures": {"done": images, "of": len(run.ids)},
        "rows": sum(one["rows"] for one in said),
        "statuses": dict(sorted(run.counts().items())),
        "failed": failures(run),
        "seconds": round(sum(one["seconds"] for one in said), 1),
        "mb": round(stored / 1e6, 3),
        "mb_per_1000_pictures": round(stored / 1e3 / images, 3) if images else None,
        "maps_mb_per_1000_pictures": round(maps / 1e3 / images, 3) if images else None,
    }


def print_status(run: RunFolder, form: str, *, quiet: bool = False) -> None:
    """Print the summary to stdout, as text or JSON; a few failures to stderr."""
    status = status_of(run)
    if form == "json":
        print(json.dumps(status, indent=2))
    else:
        for name, words in _lines(status):
            print(f"{name:<10}{words}")
    done = [said for shard in run.shards if (said := run.said(shard)) is not None]
    warnings: Counter[str] = sum((Counter(said.get("warnings", {})) for said in done), Counter())
    for text, count in [] if quiet else warnings.most_common(SHOWN):
        say(f"warning: {count} rows: {escape(text)}")
    failed = [one for said in done for one in said["failures"]]
    for one in [] if quiet else failed[:SHOWN]:
        say(f"warning: {escape(one['id'])}: {one['status']}: {escape(one['error'])}")
    if len(failed) > SHOWN and not quiet:
        say(f"warning: and {len(failed) - SHOWN} more, in failures.jsonl")


def _lines(status: dict[str, Any]) -> list[tuple[str, str]]:
    per, maps = status["mb_per_1000_pictures"], status["maps_mb_per_1000_pictures"]
    statuses = ", ".join(f"{count} {name}" for name, count in status["statuses"].items())
    return [
        ("run", escape(status["run"])),
        ("model", escape(str(status["model"]))),
        ("shards", f"{status['shards']['done']} of {status['shards']['of']} done"),
        ("pictures", f"{status['pictures']['done']} of {status['pictures']['of']} done"),
        ("rows", f"{status['rows']}: {statuses}" if status["rows"] else "0"),
        ("stored", f"{status['mb']} MB" + (f", {per} MB per 1,000 pictures (maps as float16: {maps})" if per else "")),
    ]
