"""Lazy registries of methods, adapters and other objects: name -> "module:object", imported on first use.

Other distributions add to a registry by entry points of its group. They cannot replace a name that it already has.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from grounding.core.errors import UnknownNameError
from grounding.core.printable import escape


def did_you_mean(name: str, known: list[str]) -> str:
    """Return `"; did you mean 'rollout'?"` if one of `known` is similar to `name`, else an empty string."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class Registry(Mapping[str, Any]):
    """A lazy mapping of names to objects: iterating imports nothing, `registry[name]` imports that one object.

    Parameters
    ----------
    what: the noun for an entry in messages, in the singular ("method").
    table: name -> "module:object".
    group: the entry point group of other distributions; None if they cannot add to it.
    aliases: further name -> name; iterating does not list them.

    Raises UnknownNameError, a KeyError, for names that it does not contain.
    """

    def __init__(
        self,
        what: str,
        table: Mapping[str, str],
        group: str | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.what = what
        self._aliases = dict(aliases or {})
        self.group = group
        self._own = dict(table)

    @cached_property
    def _table(self) -> dict[str, str]:
        points = () if self.group is None else entry_points(group=self.group)
        taken = self._own.keys() | self._aliases.keys()
        foreign = {point.name: point.value for point in points if not self._refused(point, taken)}
        return foreign | self._own

    def canonical(self, name: str) -> str:
        """Return the listed name that an alias stands for, any other name as it is."""
        return name if name in self._table else self._aliases.get(name, name)

    def _refused(self, point: EntryPoint, taken: Collection[str]) -> bool:
        """Whether a name is built in, with a warning of one line about the entry point that is ignored."""
        if point.name not in taken:
            return False
        source = point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"
        message = (
            f"entry point {point.name!r} of {source} is ignored: there is a built-in {self.what} of this name, "
            "choose another"
        )
        # A location without source code: Python prints the message alone.
        warnings.warn_explicit(escape(message), UserWarning, str(self.group), 1)
        return True

    def target(self, name: str) -> str:
        """Return the "module:object" of a name without importing it. Raises UnknownNameError."""
        name = self.canonical(name)
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
        return isinstance(name, str) and self.canonical(name) in self._table
