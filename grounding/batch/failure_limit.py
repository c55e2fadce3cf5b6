"""Stop a batch run early when too many rows fail, for example because of a wrong folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grounding.batch.rows import Row
from grounding.core.errors import BudgetError

SHARE, IN_A_ROW = 0.05, 100


@dataclass
class FailureLimit:
    """Counts rows as they come. Too much is: over `share` of them failed, once there are `after`, or `in_a_row` failed
    one after the other (None: however many do). (Whether every one did is for the end of the run to say.)"""

    share: float = SHARE
    after: int = 500
    in_a_row: int | None = IN_A_ROW
    seen: int = 0
    failed: int = 0
    row: int = 0
    first: str = ""
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Sequence[Row]) -> None:
        """Count rows. Raises BudgetError, with the first error as an example."""
        for row in rows:
            self.seen += 1
            bad = row["status"].startswith("failed")
            self.row = self.row + 1 if bad else 0
            if bad:
                self.failed += 1
                self.reasons[row["status"]] += 1
                self.first = self.first or str(row["error"])
            if self._lasts():
                break
        self._check()

    def _check(self) -> None:
        if self._lasts():
            raise self._error(f"{self.row} rows in a row failed")
        if self.seen >= self.after and self.failed > self.share * self.seen:
            raise self._error(f"{self.failed} of {self.seen} rows failed, more than {self.share:.0%}")

    def add_shard(self, said: Mapping[str, Any]) -> None:
        """Count the rows of a shard by its sidecar. Raises BudgetError."""
        failed = [one for one in said["failures"] if one["status"].startswith("failed")]
        self.row = self.row + said["rows"] if len(failed) == said["rows"] else 0
        self.seen += said["rows"]
        self.failed += len(failed)
        self.reasons.update(one["status"] for one in failed)
        self.first = self.first or next((one["error"] for one in failed), "")
        self._check()

    def _lasts(self) -> bool:
        return self.in_a_row is not None and self.row >= self.in_a_row

    def _error(self, what: str) -> BudgetError:
        kinds = ", ".join(f"{count} {status}" for status, count in self.reasons.most_common())
        return BudgetError(f"stopped: {what} ({kinds}); the first: {self.first}")
