"""One mechanism for every table of names: `name -> "module:object"`, imported when it is asked for.

Third parties join a table by an entry point of the table's group; no name of theirs can hide one of ours.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from grounding.core.errors import UnknownNameError


def did_you_mean(name: str, known: list[str]) -> str:
    """`"; did you mean 'rollout'?"` where one of `known` is near, else an empty string."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class Registry(Mapping[str, Any]):
    """A lazy table. Iterating it imports nothing; `table[name]` imports the one object.

    Parameters
    ----------
    what: what an entry is, in the singular ("method"), for messages.
    table: name -> "module:object".
    group: entry point group that third parties add to; none for a closed table.
    """

    def __init__(self, what: str, table: Mapping[str, str], group: str | None = None) -> None:
        self.what = what
        self.group = group
        self._own = dict(table)

    @cached_property
    def _table(self) -> dict[str, str]:
        points = () if self.group is None else entry_points(group=self.group)
        foreign = {point.name: point.value for point in points}
        return foreign | self._own

    def target(self, name: str) -> str:
        """The "module:object" behind a name, without importing it. Raises UnknownNameError."""
        if name not in self._table:
            known = list(self._table)
            raise UnknownNameError(
                f"unknown {self.what} {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)})"
            )
        return self._table[name]

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self.target(name).partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table
