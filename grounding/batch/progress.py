"""Progress of a batch run on stderr, and its summary on stdout."""

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

# Failures, and warnings, that are printed one by one.
SHOWN = 5
# Seconds between two lines of progress in a log.
LOG_SECONDS = 60


class Progress:
    """Callbacks of a batch run; this class ignores all of them."""

    def on_start(self, run: RunFolder, shards: Sequence[int], images: int) -> None:
        """This process starts to compute `images` images in these shards."""

    def on_damaged(self, path: Path) -> None:
        """A damaged table was renamed to `path`; its shard is computed again."""

    def on_shard(self, sidecar: dict[str, Any]) -> None:
        """A shard was committed."""


class Meter:
    """Count, rate and time left: a bar if stderr is a terminal, else one line a minute for a log.

    `total` is None if it is not known.
    """

    def __init__(self, total: int | None, unit: str, *, name: str = "", quiet: bool = False, note: str = "") -> None:
        self.total, self.unit, self.name, self.quiet, self.done = total, unit, name, quiet, 0
        self.started = self.last_line = time.perf_counter()
        shown = not quiet and sys.stderr.isatty()
        self.bar = tqdm(total=total, unit=unit, desc=name or None, postfix=note) if shown else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more as done; `note` is shown behind the rate."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif not self.quiet and (now := time.perf_counter()) - self.last_line >= LOG_SECONDS:
            self.last_line = now
            options = {"ncols": 0, "unit": self.unit, "prefix": self.name, "postfix": note}
            say(tqdm.format_meter(self.done, self.total, now - self.started, **options).strip())

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


class ProgressBar(Progress):
    """Show finished images and failed rows. `by_shard`: count at `on_shard`, for executors without `on_rows`."""

    def __init__(self, *, quiet: bool = False, by_shard: bool = False, name: str = "") -> None:
        self.quiet, self.by_shard, self.name = quiet, by_shard, name
        self.failed = 0
        self.meter: Meter | None = None
        self.run: RunFolder | None = None

    def on_start(self, run: RunFolder, shards: Sequence[int], images: int) -> None:
        """Show the bar, or a first line."""
        self.run = run
        done = f"{len(run.shards) - len(shards)} of {len(run.shards)} shards were done"
        self.meter = Meter(images, "image", name=self.name, quiet=self.quiet, note=done)
        if not self.quiet and self.meter.bar is None:
            left = f"{images} images to do in {len(shards)} of {len(run.shards)} shards"
            say(f"{escape(run.path)}: {left}{f' ({self.name})' if self.name else ''}")

    def on_rows(self, rows: Sequence[Row], images: int) -> None:
        """Count computed rows, and the images that they complete."""
        self.failed += sum(row["status"].startswith("failed") for row in rows)
        self._advance(images)

    def on_damaged(self, path: Path) -> None:
        """Warn that the shard is computed again."""
        say(f"warning: a damaged shard was set aside as {escape(path)} and is computed again")

    def on_shard(self, sidecar: dict[str, Any]) -> None:
        """Count the shard's rows and images, with `by_shard`."""
        if self.by_shard and self.run is not None:
            self.failed += sum(n for status, n in sidecar["counts"].items() if status.startswith("failed"))
            self._advance(len(self.run.members(sidecar["shard"])))

    def _advance(self, images: int) -> None:
        if self.meter is not None:
            self.meter.advance(images, f"{self.failed} rows failed" if self.failed else "")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.meter is not None:
            self.meter.close()


def failures(run: RunFolder) -> int:
    """Number of failed rows in the shards that are done."""
    return sum(count for status, count in run.counts().items() if status.startswith("failed"))


def run_status(run: RunFolder) -> dict[str, Any]:
    """Status of a run: shards, images and rows that are done, rows by status, stored size with and without maps."""
    sidecars = [sidecar for shard in run.shards if (sidecar := run.sidecar(shard)) is not None]
    images = sum(len(run.members(one["shard"])) for one in sidecars)
    stored, maps = sum(one["bytes"] for one in sidecars), sum(one["maps_bytes"] for one in sidecars)
    return {
        "run": str(run.path),
        "model": run.metadata.model["id"],
        "shards": {"done": len(sidecars), "of": len(run.shards)},
        "pictures": {"done": images, "of": len(run.ids)},
        "rows": sum(one["rows"] for one in sidecars),
        "statuses": dict(sorted(run.counts().items())),
        "failed": failures(run),
        "seconds": round(sum(one["seconds"] for one in sidecars), 1),
        "mb": round(stored / 1e6, 3),
        "mb_per_1000_pictures": round(stored / 1e3 / images, 3) if images else None,
        "maps_mb_per_1000_pictures": round(maps / 1e3 / images, 3) if images else None,
    }


def print_status(run: RunFolder, form: str, *, quiet: bool = False) -> None:
    """Print the status to stdout, as text or JSON; the most frequent warnings and the first failures to stderr."""
    status = run_status(run)
    if form == "json":
        print(json.dumps(status, indent=2))
    else:
        for name, text in _lines(status):
            print(f"{name:<10}{text}")
    sidecars = [sidecar for shard in run.shards if (sidecar := run.sidecar(shard)) is not None]
    warnings: Counter[str] = sum((Counter(one.get("warnings", {})) for one in sidecars), Counter())
    for text, count in [] if quiet else warnings.most_common(SHOWN):
        say(f"warning: {count} rows: {escape(text)}")
    failed = [failure for one in sidecars for failure in one["failures"]]
    for failure in [] if quiet else failed[:SHOWN]:
        say(f"warning: {escape(failure['id'])}: {failure['status']}: {escape(failure['error'])}")
    if len(failed) > SHOWN and not quiet:
        say(f"warning: and {len(failed) - SHOWN} more, in failures.jsonl")


def _lines(status: dict[str, Any]) -> list[tuple[str, str]]:
    per, maps = status["mb_per_1000_pictures"], status["maps_mb_per_1000_pictures"]
    statuses = ", ".join(f"{count} {name}" for name, count in status["statuses"].items())
    return [
        ("run", escape(status["run"])),
        ("model", escape(str(status["model"]))),
        ("shards", f"{status['shards']['done']} of {status['shards']['of']} done"),
        ("images", f"{status['pictures']['done']} of {status['pictures']['of']} done"),
        ("rows", f"{status['rows']}: {statuses}" if status["rows"] else "0"),
        ("stored", f"{status['mb']} MB" + (f", {per} MB per 1,000 images (maps as float16: {maps})" if per else "")),
    ]
