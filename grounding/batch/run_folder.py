"""Folder of a batch run: a manifest, and shards that are written atomically.

    manifest.json                        fingerprint, metadata and image ids of the run: written first
    part-00012.parquet  part-00012.json  rows of a shard, and its sidecar: rows, counts by status, sha256, failures
    failures.jsonl                       every failed row, written at the end of the run
    run.lock                             locked by the process that writes

A shard is done when its sidecar can be parsed and matches the table beside it. Both files are written under a temporary
name, synced and renamed, the sidecar last. A run that is killed at any moment keeps its finished shards; the next run
computes the others.
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

from grounding.batch.rows import Row, RunMetadata, count_warnings, maps_bytes, metadata_of, to_table
from grounding.core.errors import DataError, GroundingError, OutputError
from grounding.core.files import PART, STAGING, try_writing, write_whole
from grounding.core.printable import escape

FORMAT = "grounding.run"
SCHEMA_VERSION = 1
MANIFEST, FAILURES, MERGED = "manifest.json", "failures.jsonl", "merged.parquet"
ASIDE = ".damaged-"
# Distinct warnings counted in a sidecar: the most frequent ones.
MAX_WARNINGS = 20
# Keys that every sidecar has.
SIDECAR_KEYS = {"shard", "rows", "counts", "bytes", "maps_bytes", "sha256", "seconds", "failures"}


class RunFolder:
    """A run with a manifest. The rows of an image are contiguous, and in one shard."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open the run in a folder. Raises DataError if there is none, or one of another version."""
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

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Ids of the images, and of the broken rows of the data set, in order."""
        return tuple(self.manifest["ids"])

    @property
    def metadata(self) -> RunMetadata:
        """What all rows share."""
        return RunMetadata(**self.manifest["about"])

    @property
    def shards(self) -> range:
        """Numbers of all shards."""
        return range(-(-len(self.ids) // self.manifest["fingerprint"]["shard_size"]))

    def members(self, shard: int) -> tuple[str, ...]:
        """Ids of a shard."""
        size = self.manifest["fingerprint"]["shard_size"]
        return self.ids[shard * size : (shard + 1) * size]

    def table_path(self, shard: int) -> Path:
        """Path of a shard's table."""
        return self.path / f"part-{shard:05d}.parquet"

    def sidecar_path(self, shard: int) -> Path:
        """Path of a shard's sidecar."""
        return self.path / f"part-{shard:05d}.json"

    # ------------------------------------------------------------------ writing

    def commit(self, shard: int, rows: Sequence[Row], seconds: float) -> dict[str, Any]:
        """Write a shard, table first; return its sidecar. Raises OutputError; no partial file stays."""
        data = encode(to_table(rows, self.metadata))
        sidecar = {
            "format": FORMAT,
            "shard": shard,
            "rows": len(rows),
            "counts": dict(sorted(Counter(row["status"] for row in rows).items())),
            "bytes": len(data),
            "maps_bytes": maps_bytes(rows, self.metadata),
            "sha256": hashlib.sha256(data).hexdigest(),
            "seconds": round(seconds, 3),
            "warnings": dict(count_warnings(rows, self.metadata).most_common(MAX_WARNINGS)),
            "failures": [
                {name: row[name] for name in ("id", "image", "status", "error")} for row in rows if row.get("error")
            ],
        }
        try:
            # Removed first: an old sidecar beside a new table could match it. Without a sidecar a shard is not done.
            self.sidecar_path(shard).unlink(missing_ok=True)
            write_whole(self.table_path(shard), data)
            write_whole(self.sidecar_path(shard), _json(sidecar))
        except OSError as error:
            raise OutputError(
                f"cannot write {escape(self.table_path(shard))}: {error.strerror or error}; resume later"
            ) from None
        return sidecar

    def finish(self) -> None:
        """Write failures.jsonl from all shards that are done. Raises OSError."""
        lines = [json.dumps(one) for shard in self.shards for one in (self.sidecar(shard) or {}).get("failures", ())]
        write_whole(self.path / FAILURES, "".join(line + "\n" for line in lines).encode("ascii"))

    def set_aside(self, shard: int) -> Path | None:
        """Remove the sidecar of a damaged shard, and rename its table if there is one; return the table's new path."""
        table = self.table_path(shard)
        self.sidecar_path(shard).unlink(missing_ok=True)
        if not table.exists():
            return None
        number = next(n for n in range(1, 10**6) if not table.with_name(f"{table.name}{ASIDE}{n}").exists())
        return table.rename(table.with_name(f"{table.name}{ASIDE}{number}"))

    def remove_partial_files(self) -> None:
        """Remove temporary files of killed processes. The caller must hold the lock."""
        for name in ("part-*", MANIFEST + "*", FAILURES + "*", MERGED + "*"):
            for path in self.path.glob(f"{name}{PART}*"):
                path.unlink(missing_ok=True)
        for path in self.path.glob(f"{STAGING}*"):
            with suppress(OSError):  # not empty: of another program
                path.rmdir()

    # ------------------------------------------------------------------ reading

    def sidecar(self, shard: int) -> dict[str, Any] | None:
        """The sidecar of a shard that is done, else None. The table is compared by its size and number of rows."""
        try:
            sidecar = json.loads(self.sidecar_path(shard).read_bytes())
            table = self.table_path(shard)
            fits = table.stat().st_size == sidecar["bytes"] and pq.read_metadata(table).num_rows == sidecar["rows"]
            fits = fits and sum(sidecar["counts"].values()) == sidecar["rows"] and sidecar["shard"] == shard
        except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException):
            return None
        return sidecar if fits and sidecar.keys() >= SIDECAR_KEYS else None

    def stamp(self, shard: int) -> int:
        """A number that changes with each commit of a shard; 0 before the first."""
        try:
            found = self.sidecar_path(shard).stat()
            return hash((found.st_mtime_ns, found.st_ino))  # another file, even within one tick of the clock
        except OSError:
            return 0

    def damaged(self, shard: int) -> bool:
        """Whether a shard has files, but they are incomplete or do not match (sha256)."""
        sidecar = self.sidecar(shard)
        if sidecar is None:
            return self.table_path(shard).exists() or self.sidecar_path(shard).exists()
        return hashlib.sha256(self.table_path(shard).read_bytes()).hexdigest() != sidecar["sha256"]

    def table(self, shard: int) -> pa.Table:
        """Read the table of a shard that is done. Raises DataError if it does not match its sidecar."""
        sidecar = self.sidecar(shard)
        path = self.table_path(shard)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{escape(path)}: {error.strerror or error}") from None
        if sidecar is None or hashlib.sha256(data).hexdigest() != sidecar["sha256"]:
            raise DataError(f"{escape(path)} is damaged (it does not match its sidecar): run again to compute it anew")
        table = pq.read_table(io.BytesIO(data), use_threads=False)  # pyarrow 26: its threads may abort Python at exit
        metadata_of(table)
        return table

    def images(self) -> Iterator[list[Row]]:
        """Yield the rows of each image, of all shards that are done. Raises DataError."""
        for shard in self.shards:
            if self.sidecar(shard) is not None:
                rows = self.table(shard).to_pylist()
                yield from (list(own) for _, own in groupby(rows, key=lambda row: row["image"]))

    def counts(self) -> Counter[str]:
        """Number of rows by status, of all shards that are done."""
        sidecars = [sidecar for shard in self.shards if (sidecar := self.sidecar(shard)) is not None]
        return sum((Counter(sidecar["counts"]) for sidecar in sidecars), Counter())

    def shared(self, rows: Sequence[Row]) -> dict[str, Row]:
        """The maps of one image that do not depend on the text, by column, from all its rows."""
        return {key: row[key] for key in self.metadata.shared for row in rows if row.get(key) is not None}

    def merge(self) -> Path:
        """Write all shards as one table, merged.parquet. Raises GroundingError for missing shards, and for ids that are
        missing or not unique."""
        missing = [shard for shard in self.shards if self.sidecar(shard) is None]
        if missing:
            raise GroundingError(f"{len(missing)} of {len(self.shards)} shards are not done: run again, then merge")
        names: Counter[str] = Counter()
        target = self.path / MERGED
        part = target.with_name(f"{MERGED}{PART}merge")
        try:
            # Tables without a second view of any image lack its columns.
            wanted = max((pq.read_schema(self.table_path(shard)) for shard in self.shards), key=len)
            with pq.ParquetWriter(part, wanted, compression="zstd") as writer:
                for shard in self.shards:
                    table = self.table(shard)
                    names.update(table["id"].to_pylist())
                    if set(table["image"].to_pylist()) != set(self.members(shard)):
                        raise DataError(f"{escape(self.table_path(shard))} has other images than the manifest")
                    writer.write_table(_with_columns(table, wanted))
            if twice := next((name for name, count in names.items() if count > 1), None):
                raise DataError(f"the id {twice!r} is in the run twice")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with columns of nulls where it lacks those of a schema."""
    for field in (field for field in schema if field.name not in table.schema.names):
        table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest atomically. Raises OSError."""
    write_whole(folder / MANIFEST, _json({"format": FORMAT, "schema_version": SCHEMA_VERSION, **manifest}))


def encode(table: pa.Table) -> bytes:
    """The bytes of a Parquet file, equal for equal rows."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode("ascii")


LOCK = "run.lock"


def check_folder(path: str | Path) -> Path:
    """Return the folder if a run can be written into it: new, empty, or with a run. Raises OutputError."""
    folder = Path(path)
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # raises for a name that no file can have
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{escape(folder)} is a file, not a folder; choose another --output")
        if folder.is_dir() and not (folder / MANIFEST).exists() and not all(map(_is_leftover, folder.iterdir())):
            raise OutputError(f"{escape(folder)} holds other files and no batch run; choose another folder")
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


def _is_leftover(path: Path) -> bool:
    """Whether a file may be of a run without a manifest: the run was killed, or another process is starting it."""
    return path.name == LOCK or PART in path.name or path.name.startswith(STAGING)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock, which the system releases when the process ends. Folders created for the lock are removed
    afterwards if no run has begun in them. Raises OutputError if another process holds the lock."""
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
                with suppress(OSError):  # another process uses it by now
                    place.rmdir()
        lock.release()
