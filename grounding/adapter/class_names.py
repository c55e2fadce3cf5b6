"""Names of classes, and the class that a name or an index means."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grounding.core.errors import TargetError, TextError
from grounding.core.registry import did_you_mean

# Default class names of transformers.
DEFAULT_NAME = re.compile(r"LABEL_\d+")
# Number of class names in a message.
LISTED_NAMES = 8


@dataclass(frozen=True)
class ClassNames:
    """Names of classes 0, 1, ...; a class may have several, separated by commas: "great white shark, white shark".

    `what` is the noun for the model in messages.
    """

    names: tuple[str, ...]
    what: str = "the model"

    def __len__(self) -> int:
        return len(self.names)

    def find(self, wanted: Any, hint: str = "") -> int:
        """Return the index of a class, given its index, its name or one of its names; case is ignored.

        Raises TargetError for no class (the message ends in `hint`) and for a name of several classes, TextError for
        an empty name.
        """
        if not isinstance(wanted, str):
            return self._checked(wanted)
        name = _folded(wanted)
        if not name:
            raise TextError("a class name is empty: give a name or an index")
        found = self._whole.get(name) or self._parts.get(name) or []
        if not found and re.fullmatch(r"-?\d+", name):
            return self._checked(int(name))
        if not found:
            listed = ", ".join(repr(one) for one in self.names[:LISTED_NAMES]) + (
                ", ..." if len(self) > LISTED_NAMES else ""
            )
            near = did_you_mean(name, list(dict.fromkeys([*self._whole, *self._parts])))
            raise TargetError(f"{self.what} has no class {wanted!r}{near} (it has {len(self)}: {listed}){hint}")
        if len(found) > 1:
            listed = ", ".join(f"{index} {self.names[index]!r}" for index in found)
            raise TargetError(f"{wanted!r} names {len(found)} classes of {self.what}: {listed}; give the index")
        return found[0]

    def contains(self, name: str) -> bool:
        """Whether a class has this name, alone or among others."""
        return _folded(name) in self._whole or _folded(name) in self._parts

    @property
    def unnamed(self) -> bool:
        """Whether all names are default names, which state only the index."""
        return all(DEFAULT_NAME.fullmatch(name) for name in self.names)

    def _checked(self, wanted: Any) -> int:
        try:
            index = operator.index(wanted)
        except TypeError:
            index = None
        if index is None or isinstance(wanted, bool):
            raise TargetError(f"a class is given by name or index, not by {wanted!r} ({type(wanted).__name__})")
        if not 0 <= index < len(self):
            range_ = f"its {len(self)} classes are 0 to {len(self) - 1}" if len(self) > 1 else "its only class is 0"
            raise TargetError(f"{self.what} has no class {index}: {range_}")
        return index

    @cached_property
    def _whole(self) -> dict[str, list[int]]:
        return _by_name((_folded(name), index) for index, name in enumerate(self.names))

    @cached_property
    def _parts(self) -> dict[str, list[int]]:
        parts = ((_folded(part), index) for index, name in enumerate(self.names) for part in name.split(","))
        return _by_name(dict.fromkeys(parts))


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def _by_name(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    made: dict[str, list[int]] = defaultdict(list)
    for name, index in pairs:
        made[name].append(index)
    return dict(made)
