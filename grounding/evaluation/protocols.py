"""Protocols of the pointing game for batch runs: the cases that each protocol makes of the phrases of an image.

`mention-anybox` (ALBEF, AMC, SelfEQ; see `pointing`): a case is a mention of a phrase, the phrase is the text, and a
hit lies strictly inside any of the chain's boxes. In a run the maps of a phrase are those of its tokens in the caption.
They equal the maps of its lower-case text where a tokenizer folds case and does not mark blanks.

`chain-unionbox` (MG: Akbari et al. 2019, arXiv:1811.11683; GbS: Arbelle et al. 2021, arXiv:2104.09829; WWbL:
Shaharabany et al. 2022, arXiv:2206.09358): a case is a chain whose first box covers more than 5 % of the image, the
texts are `image of <phrase>` for each of its mentions, their maps are averaged, and a hit lies inside the box that
encloses all boxes of the chain, or on its edge. As in the published code, each map is rescaled to [0, 1] over the seen
patches before averaging.

Numbers of the two protocols are not comparable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from grounding.batch.requests import PHRASE_ALONE, UNION_BOX
from grounding.batch.rows import PROMPT
from grounding.core.geometry import Box
from grounding.datasets.records import Phrase, Record
from grounding.evaluation.pointing import Mention, no_box_reason
from grounding.explanation.explanation import PatchMap
from grounding.explanation.maps import Status, diagnose, limits, rescale

# Share of the image that the first box of a chain must exceed, and the reason of chains that are skipped for it.
MIN_BOX_SHARE = 0.05
SMALL_BOX = "small"


@dataclass(frozen=True, eq=False)
class PhraseMaps:
    """A phrase of an image with its maps (method key -> map), or None and the `reason` for which there are none."""

    phrase: Phrase
    mention: Mention
    maps: Mapping[str, PatchMap] | None
    reason: str = ""


@dataclass
class Cases:
    """Cases of one image: `boxes` of its chains, and for each of the `mentions` its maps.

    `phrases` counts the phrases that the cases consist of, `skipped` the other phrases by reason.
    """

    boxes: Mapping[str, tuple[Box, ...]]
    mentions: list[Mention] = field(default_factory=list)
    maps: list[Mapping[str, PatchMap]] = field(default_factory=list)
    phrases: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, mention: Mention, maps: Mapping[str, PatchMap], phrases: int) -> None:
        """Add a case that consists of so many phrases."""
        self.mentions.append(mention)
        self.maps.append(maps)
        self.phrases += phrases


@dataclass(frozen=True)
class Protocol:
    """A protocol of the pointing game.

    `kind`: kind of the entries that have its texts. `closed`: the edge of a box is inside. `cases`: makes the cases of
    an image. `unit`, `text`, `hit`: what a case, its text and a hit are, in words.
    """

    name: str
    kind: str
    closed: bool
    cases: Callable[[Record, Sequence[PhraseMaps]], Cases]
    unit: str
    text: str
    hit: str


def mention_anybox(record: Record, phrases: Sequence[PhraseMaps]) -> Cases:
    """Make a case of each phrase that has boxes and maps."""
    cases = Cases(record.boxes)
    for one in phrases:
        if one.phrase.chain not in record.boxes:
            cases.skipped[no_box_reason(record, one.phrase)] += 1
        elif one.maps is None:
            cases.skipped[one.reason] += 1
        else:
            cases.add(one.mention, one.maps, 1)
    return cases


def chain_unionbox(record: Record, phrases: Sequence[PhraseMaps]) -> Cases:
    """Make a case of each chain with a large enough first box and maps for at least one mention."""
    cases = Cases({chain: (enclosing_box(boxes),) for chain, boxes in record.boxes.items()})
    chains: dict[str, list[PhraseMaps]] = {}
    for one in phrases:
        if one.phrase.chain in record.boxes:
            chains.setdefault(one.phrase.chain, []).append(one)
        else:
            cases.skipped[no_box_reason(record, one.phrase)] += 1
    size = next((m.geometry.width * m.geometry.height for one in phrases for m in (one.maps or {}).values()), None)
    for chain, own in chains.items():
        x0, y0, x1, y1 = record.boxes[chain][0]
        if size is not None and (x1 - x0) * (y1 - y0) <= MIN_BOX_SHARE * size:
            cases.skipped[SMALL_BOX] += len(own)
            continue
        cases.skipped.update(one.reason for one in own if one.maps is None)
        if maps := [one.maps for one in own if one.maps is not None]:
            mean = {key: average_maps([by_key[key] for by_key in maps]) for key in maps[0]}
            cases.add(_chain_mention(chain, own), mean, len(maps))
    return cases


def _chain_mention(chain: str, own: Sequence[PhraseMaps]) -> Mention:
    """Return a chain as one mention: all texts and types of its phrases; held out if all of them are."""
    texts = dict.fromkeys(one.mention.text for one in own)
    types = dict.fromkeys(kind for one in own for kind in one.mention.types)
    return Mention("; ".join(texts), chain, tuple(types), all(one.mention.heldout for one in own))


def enclosing_box(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that contains all boxes; original pixels, (x0, y0, x1, y1), half-open."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def average_maps(maps: Sequence[PatchMap]) -> PatchMap:
    """Average maps of one method on one patch grid, each rescaled to [0, 1] over the seen patches.

    Maps without evidence count as zero; without any evidence the average has none either. The result is unsigned, from
    0 to 1, and has the entry of the first map.
    """
    first, seen = maps[0], maps[0].geometry.seen_cells
    views = [one.view for one in maps if one.status]
    scaled = [rescale(view, *limits([view[seen]], "entry", None)) for view in views]
    raw = np.zeros(first.raw.shape, np.float32)
    if scaled:
        raw += np.sum(scaled, axis=0, dtype=np.float64) / len(maps)
    status = diagnose(raw, seen, signed=False) if views else Status("degenerate", first.status.reason)
    method = replace(first.method, signed=False, maps=raw[None], status=(status,))
    return PatchMap(first.entry, method, raw, status, first.geometry)


_ANY_BOX = Protocol(
    name=PHRASE_ALONE,
    kind="phrase",
    closed=False,
    cases=mention_anybox,
    unit="phrases",
    text="the phrase alone, by its tokens in the caption",
    hit="strictly inside any box of the chain",
)
_UNION_BOX = Protocol(
    name=UNION_BOX,
    kind=PROMPT,
    closed=True,
    cases=chain_unionbox,
    unit=f"chains whose first box covers more than {100 * MIN_BOX_SHARE:g} % of the image",
    text="`image of <phrase>`, lower case, maps rescaled to [0, 1] and averaged over the chain's mentions",
    hit="inside the box around all boxes of the chain or on its edge",
)
PROTOCOL_TABLE: Mapping[str, Protocol] = {protocol.name: protocol for protocol in (_ANY_BOX, _UNION_BOX)}
