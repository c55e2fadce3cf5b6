"""Stop a batch run early when too many rows fail, for example because of a wrong folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grounding.batch.rows import Row
from grounding.core.errors import FailureLimitError

MAX_SHARE, MAX_IN_A_ROW = 0.05, 100


@dataclass
class FailureLimit:
    """Count rows as they are computed and raise FailureLimitError when too many of them failed.

    The limit is exceeded when more than `share` of at least `after` rows failed, or when `in_a_row` consecutive rows
    failed (None: no such limit). A run whose rows all failed is detected at its end, by `run_batch`.
    """

    share: float = MAX_SHARE
    after: int = 500
    in_a_row: int | None = MAX_IN_A_ROW
    seen: int = 0
    failed: int = 0
    streak: int = 0
    first: str = ""
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Sequence[Row]) -> None:
        """Count rows. Raises FailureLimitError, with the first error as an example."""
        for row in rows:
            self.seen += 1
            bad = row["status"].startswith("failed")
            self.streak = self.streak + 1 if bad else 0
            if bad:
                self.failed += 1
                self.reasons[row["status"]] += 1
                self.first = self.first or str(row["error"])
            if self._streak_exceeded():
                break
        self._check()

    def add_shard(self, sidecar: Mapping[str, Any]) -> None:
        """Count the rows of a shard from its sidecar. Raises FailureLimitError."""
        failed = [one for one in sidecar["failures"] if one["status"].startswith("failed")]
        self.streak = self.streak + sidecar["rows"] if len(failed) == sidecar["rows"] else 0
        self.seen += sidecar["rows"]
        self.failed += len(failed)
        self.reasons.update(one["status"] for one in failed)
        self.first = self.first or next((one["error"] for one in failed), "")
        self._check()

    def _check(self) -> None:
        if self._streak_exceeded():
            raise self._error(f"{self.streak} rows in a row failed")
        if self.seen >= self.after and self.failed > self.share * self.seen:
            raise self._error(f"{self.failed} of {self.seen} rows failed, more than {self.share:.0%}")

    def _streak_exceeded(self) -> bool:
        return self.in_a_row is not None and self.streak >= self.in_a_row

    def _error(self, what: str) -> FailureLimitError:
        kinds = ", ".join(f"{count} {status}" for status, count in self.reasons.most_common())
        return FailureLimitError(f"stopped: {what} ({kinds}); the first: {self.first}")
