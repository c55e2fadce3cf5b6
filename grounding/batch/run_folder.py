"""The folder of a batch run: a manifest, and shards that are there whole or not at all.

    manifest.json                        what is computed, over which pictures: written first
    part-00012.parquet  part-00012.json  the rows of a shard, and its sidecar: rows, counts by status, sha256, failures
    failures.jsonl                       every row that failed, once the run ended
    run.lock                             held by the process that writes

A shard is done when its sidecar can be read and fits the table beside it. Both are written under another name, synced
and renamed, the sidecar last: whatever kills a run, what is done is done, and the rest is computed again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from grounding.batch.rows import Row, RunMetadata, about_of, doubts_of, maps_bytes, to_table
from grounding.core.errors import DataError, GroundingError, OutputError
from grounding.core.files import PART, STAGING, try_writing, write_whole
from grounding.core.printable import escape

FORMAT = "grounding.run"
SCHEMA_VERSION = 1
MANIFEST, FAILURES, MERGED = "manifest.json", "failures.jsonl", "merged.parquet"
ASIDE = ".damaged-"
# Distinct warnings that a sidecar counts: those of most rows.
WARNINGS = 20
# What a sidecar says, at least.
SIDECAR = {"shard", "rows", "counts", "bytes", "maps_bytes", "sha256", "seconds", "failures"}


class RunFolder:
    """A run that has a manifest. Rows of a picture stand together and never cross shards."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run in a folder. Raises DataError where there is none, or one of another version."""
        path = Path(path)
        file = path / MANIFEST
        try:
            manifest = json.loads(file.read_bytes())
        except OSError as error:
            raise DataError(f"{escape(path)} holds no run: {MANIFEST}: {error.strerror or error}") from None
        except ValueError as error:
            raise DataError(f"{escape(file)} is damaged: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"{escape(file)} was not written by a batch run")
        if manifest.get("schema_version") != SCHEMA_VERSION:
            version = manifest.get("schema_version")
            raise DataError(f"{escape(file)} has schema version {version!r}, this version reads {SCHEMA_VERSION}")
        return cls(path, manifest)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a folder holds a run of ours."""
        with suppress(DataError):
            cls.open(path)
            return True
        return False

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The pictures, and the broken rows of the data set, in order."""
        return tuple(self.manifest["ids"])

    @property
    def about(self) -> RunMetadata:
        """What all rows have in common."""
        return RunMetadata(**self.manifest["about"])

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(-(-len(self.ids) // self.manifest["fingerprint"]["shard_size"]))

    def members(self, shard: int) -> tuple[str, ...]:
        """The ids of a shard."""
        size = self.manifest["fingerprint"]["shard_size"]
        return self.ids[shard * size : (shard + 1) * size]

    def part(self, shard: int) -> Path:
        """The table of a shard."""
        return self.path / f"part-{shard:05d}.parquet"

    def sidecar(self, shard: int) -> Path:
        """What is said of a shard."""
        return self.path / f"part-{shard:05d}.json"

    # ------------------------------------------------------------------ writing

    def commit(self, shard: int, rows: Sequence[Row], seconds: float) -> dict[str, Any]:
        """Write a shard: table, then sidecar; returns the sidecar. Raises OutputError; nothing half-written stays."""
        data = encode(to_table(rows, self.about))
        said = {
            "format": FORMAT,
            "shard": shard,
            "rows": len(rows),
            "counts": dict(sorted(Counter(row["status"] for row in rows).items())),
            "bytes": len(data),
            "maps_bytes": maps_bytes(rows, self.about),
            "sha256": hashlib.sha256(data).hexdigest(),
            "seconds": round(seconds, 3),
            "warnings": dict(doubts_of(rows, self.about).most_common(WARNINGS)),
            "failures": [
                {name: row[name] for name in ("id", "image", "status", "error")} for row in rows if row.get("error")
            ],
        }
        try:
            # Without its sidecar a table counts as not there, whatever is in it: never an old one beside a new table.
            self.sidecar(shard).unlink(missing_ok=True)
            write_whole(self.part(shard), data)
            write_whole(self.sidecar(shard), _json(said))
        except OSError as error:
            raise OutputError(
                f"cannot write {escape(self.part(shard))}: {error.strerror or error}; resume later"
            ) from None
        return said

    def finish(self) -> None:
        """Write failures.jsonl anew from all shards that are done. Raises OSError."""
        lines = [json.dumps(one) for shard in self.shards for one in (self.said(shard) or {}).get("failures", ())]
        write_whole(self.path / FAILURES, "".join(line + "\n" for line in lines).encode("ascii"))

    def set_aside(self, shard: int) -> Path | None:
        """Rename the table of a shard that is not whole, where there is one; returns its new name."""
        part = self.part(shard)
        self.sidecar(shard).unlink(missing_ok=True)
        if not part.exists():
            return None
        number = next(n for n in range(1, 10**6) if not part.with_name(f"{part.name}{ASIDE}{n}").exists())
        return part.rename(part.with_name(f"{part.name}{ASIDE}{number}"))

    def clear_parts(self) -> None:
        """Remove what killed processes left half-written; only for who holds the lock."""
        for name in ("part-*", MANIFEST + "*", FAILURES + "*", MERGED + "*"):
            for path in self.path.glob(f"{name}{PART}*"):
                path.unlink(missing_ok=True)
        for path in self.path.glob(f"{STAGING}*"):
            with suppress(OSError):  # not empty: somebody else's
                path.rmdir()

    # ------------------------------------------------------------------ reading

    def said(self, shard: int) -> dict[str, Any] | None:
        """The sidecar of a shard that is done, else None."""
        try:
            said = json.loads(self.sidecar(shard).read_bytes())
            part = self.part(shard)
            fits = part.stat().st_size == said["bytes"] and pq.read_metadata(part).num_rows == said["rows"]
            fits = fits and sum(said["counts"].values()) == said["rows"] and said["shard"] == shard
        except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException):
            return None
        return said if fits and said.keys() >= SIDECAR else None

    def stamp(self, shard: int) -> int:
        """Another number after each commit of a shard; 0 where there was none."""
        try:
            found = self.sidecar(shard).stat()
            return hash((found.st_mtime_ns, found.st_ino))  # another file, even within one tick of the clock
        except OSError:
            return 0

    def damaged(self, shard: int) -> bool:
        """Whether there is something of a shard that is not whole, to the last byte."""
        said = self.said(shard)
        if said is None:
            return self.part(shard).exists() or self.sidecar(shard).exists()
        return hashlib.sha256(self.part(shard).read_bytes()).hexdigest() != said["sha256"]

    def table(self, shard: int) -> pa.Table:
        """The rows of a shard that is done. Raises DataError where they are not what was written."""
        said = self.said(shard)
        try:
            data = self.part(shard).read_bytes()
        except OSError as error:
            raise DataError(f"{escape(self.part(shard))}: {error.strerror or error}") from None
        if said is None or hashlib.sha256(data).hexdigest() != said["sha256"]:
            raise DataError(
                f"{escape(self.part(shard))} is damaged (it does not fit its sidecar): run again to renew it"
            )
        table = pq.read_table(io.BytesIO(data), use_threads=False)  # pyarrow 26: threads left at the end abort Python
        about_of(table)
        return table

    def images(self) -> Iterator[list[Row]]:
        """The rows of each picture, of all shards that are done. Raises DataError."""
        for shard in self.shards:
            if self.said(shard) is not None:
                rows = self.table(shard).to_pylist()
                yield from (list(own) for _, own in groupby(rows, key=lambda row: row["image"]))

    def counts(self) -> Counter[str]:
        """Rows by status, of all shards that are done."""
        return sum((Counter(said["counts"]) for s in self.shards if (said := self.said(s)) is not None), Counter())

    def shared(self, rows: Sequence[Row]) -> dict[str, Row]:
        """Of the rows of one picture, the maps that do not see the text."""
        return {key: row[key] for key in self.about.shared for row in rows if row[key] is not None}

    def merge(self) -> Path:
        """All shards as one table, merged.parquet. Raises GroundingError: shards missing, an id twice or missing."""
        missing = [shard for shard in self.shards if self.said(shard) is None]
        if missing:
            raise GroundingError(f"{len(missing)} of {len(self.shards)} shards are not done: run again, then merge")
        names: Counter[str] = Counter()
        target = self.path / MERGED
        part = target.with_name(f"{MERGED}{PART}merge")
        try:
            with pq.ParquetWriter(part, self.table(0).schema, compression="zstd") as writer:
                for shard in self.shards:
                    table = self.table(shard)
                    names.update(table["id"].to_pylist())
                    if set(table["image"].to_pylist()) != set(self.members(shard)):
                        raise DataError(f"{escape(self.part(shard))} has other pictures than the manifest says")
                    writer.write_table(table)
            if twice := next((name for name, count in names.items() if count > 1), None):
                raise DataError(f"the id {twice!r} stands in the run twice")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, whole. Raises OSError."""
    write_whole(folder / MANIFEST, _json({"format": FORMAT, "schema_version": SCHEMA_VERSION, **manifest}))


def encode(table: pa.Table) -> bytes:
    """The bytes of a Parquet file, the same for the same rows."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode("ascii")


LOCK = "run.lock"


def check_folder(path: str | Path) -> Path:
    """The folder, if a run can be written into it: made, empty, or holding a run of ours. Raises OutputError."""
    folder = Path(path)
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # a name that no file can have says so here
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{escape(folder)} is a file, not a folder; choose another --output")
        if folder.is_dir() and not (folder / MANIFEST).exists() and not all(map(_is_left_over, folder.iterdir())):
            raise OutputError(f"{escape(folder)} holds other files and no run of grounding; choose another folder")
        if (folder / MANIFEST).exists():
            RunFolder.open(folder)
        try_writing(folder)
    except OutputError:
        raise
    except DataError as error:
        raise OutputError(str(error)) from None
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write into {escape(folder)}: {getattr(error, 'strerror', None) or error}") from None
    return folder


def _is_left_over(path: Path) -> bool:
    """Whether a file may be of a run that has no manifest: it was killed, or another process is just beginning it."""
    return path.name == LOCK or PART in path.name or path.name.startswith(STAGING)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock; the system lets go of it when the process ends, however. A folder that was made for it and
    in which no run began is gone afterwards. Raises OutputError."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"another run is writing into {escape(folder)}: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        if missing and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            for place in missing:
                with suppress(OSError):  # somebody else uses it by now
                    place.rmdir()
        lock.release()
