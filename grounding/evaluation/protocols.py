"""The protocols of the pointing game that a batch run is scored by: which cases each makes of a picture's phrases.

`mention-anybox` (ALBEF, AMC, SelfEQ): a case is a mention of a phrase, the phrase is the text, a hit is strictly inside
any of the chain's boxes. In a run the phrase alone is its tokens as they are in the caption: the same as those of its
text in lower case where a tokenizer folds case and marks no blanks.

`chain-unionbox` (MG: Akbari et al. 2019; Gbs: Arbelle et al. 2021; WWbL: Shaharabany et al. 2022): a case is a chain
whose first box covers more than 5 % of the picture, the texts are `image of <phrase>` for each of its mentions, their
maps are averaged, a hit is inside the box around all of the chain's boxes or on its edge. As the published code for
attention maps does, each map is rescaled to [0, 1] over what was seen before they are averaged.

Their numbers must never stand in one table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from grounding.batch.requests import PHRASE_ALONE, PROTOCOLS, UNION_BOX
from grounding.batch.rows import PROMPT
from grounding.core.geometry import Box
from grounding.datasets.records import Phrase, Record
from grounding.evaluation.pointing import Mention, why_no_box
from grounding.explanation.explanation import PatchMap
from grounding.explanation.maps import Status, diagnose, limits, rescale

# The part of a picture that the first box of a chain must exceed.
SMALLEST = 0.05
SMALL = "small"


@dataclass(frozen=True, eq=False)
class PhraseMaps:
    """A phrase of a picture with its maps by column key, or with the `reason` for which there are none."""

    phrase: Phrase
    mention: Mention
    maps: Mapping[str, PatchMap] | None
    reason: str = ""


@dataclass
class Cases:
    """What is scored of a picture: `boxes` of its chains, and for each mention in `mentions` the maps.

    `phrases` counts the phrases that are in them; `skipped` those that are not, by reason.
    """

    boxes: Mapping[str, tuple[Box, ...]]
    mentions: list[Mention] = field(default_factory=list)
    maps: list[Mapping[str, PatchMap]] = field(default_factory=list)
    phrases: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, mention: Mention, maps: Mapping[str, PatchMap], phrases: int) -> None:
        """One case."""
        self.mentions.append(mention)
        self.maps.append(maps)
        self.phrases += phrases


@dataclass(frozen=True)
class Protocol:
    """A protocol: the `kind` of entry that has its texts, whether boxes are `closed`, what it makes of a picture.

    `unit`, `text` and `hit` say in words what a case is, what is explained and what a hit is.
    """

    name: str
    kind: str
    closed: bool
    cases: Callable[[Record, Sequence[PhraseMaps]], Cases]
    unit: str
    text: str
    hit: str


def mention_anybox(record: Record, told: Sequence[PhraseMaps]) -> Cases:
    """A case for each phrase that has boxes and maps."""
    cases = Cases(record.boxes)
    for one in told:
        if one.phrase.chain not in record.boxes:
            cases.skipped[why_no_box(record, one.phrase)] += 1
        elif one.maps is None:
            cases.skipped[one.reason] += 1
        else:
            cases.add(one.mention, one.maps, 1)
    return cases


def chain_unionbox(record: Record, told: Sequence[PhraseMaps]) -> Cases:
    """A case for each chain with a first box that is large enough and maps for at least one mention."""
    cases = Cases({chain: (around(boxes),) for chain, boxes in record.boxes.items()})
    chains: dict[str, list[PhraseMaps]] = {}
    for one in told:
        if one.phrase.chain in record.boxes:
            chains.setdefault(one.phrase.chain, []).append(one)
        else:
            cases.skipped[why_no_box(record, one.phrase)] += 1
    size = next((m.geometry.width * m.geometry.height for one in told for m in (one.maps or {}).values()), None)
    for chain, own in chains.items():
        x0, y0, x1, y1 = record.boxes[chain][0]
        if size is not None and (x1 - x0) * (y1 - y0) <= SMALLEST * size:
            cases.skipped[SMALL] += len(own)
            continue
        cases.skipped.update(one.reason for one in own if one.maps is None)
        if found := [one.maps for one in own if one.maps is not None]:
            mean = {key: average([maps[key] for maps in found]) for key in found[0]}
            cases.add(_whole(chain, own), mean, len(found))
    return cases


def _whole(chain: str, own: Sequence[PhraseMaps]) -> Mention:
    """A chain as one mention: every text and type of its phrases; held out where all of them are."""
    texts = dict.fromkeys(one.mention.text for one in own)
    types = dict.fromkeys(kind for one in own for kind in one.mention.types)
    return Mention("; ".join(texts), chain, tuple(types), all(one.mention.heldout for one in own))


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box with all boxes in it; original pixels, (x0, y0, x1, y1), half-open."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def average(maps: Sequence[PatchMap]) -> PatchMap:
    """The mean of what speaks for the entries of several maps of one method, each rescaled to [0, 1] over what was
    seen. A map without evidence adds nothing; where none has any, so has the mean.

    The result is a map on the same patch grid, from 0 to 1, that is never negative; its entry is the first one's.
    """
    first, seen = maps[0], maps[0].geometry.seen_cells
    found = [one.view for one in maps if one.status]
    scaled = [rescale(view, *limits([view[seen]], "entry", None)) for view in found]
    raw = np.zeros(first.raw.shape, np.float32)
    if scaled:
        raw += np.sum(scaled, axis=0, dtype=np.float64) / len(maps)
    status = diagnose(raw, seen, signed=False) if found else Status("degenerate", first.status.reason)
    column = replace(first.method, signed=False, maps=raw[None], status=(status,))
    return PatchMap(first.entry, column, raw, status, first.geometry)


_ALL = (
    Protocol(
        PHRASE_ALONE,
        "phrase",
        False,
        mention_anybox,
        "phrases",
        "the phrase alone, by its tokens in the caption",
        "strictly inside any box of the chain",
    ),
    Protocol(
        UNION_BOX,
        PROMPT,
        True,
        chain_unionbox,
        f"chains whose first box covers more than {100 * SMALLEST:g} % of the picture",
        "`image of <phrase>`, lower case, maps rescaled to [0, 1] and averaged over the chain's mentions",
        "inside the box around all boxes of the chain or on its edge",
    ),
)
TABLE: Mapping[str, Protocol] = {name: next(one for one in _ALL if one.name == name) for name in PROTOCOLS}
