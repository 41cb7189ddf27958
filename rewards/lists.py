"""Rewards that look at the rollouts alone, not at the targets: validity, diversity, popularity, overlong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rewards.groups import holds_slates, set_illegal
from rewards.protocol import RewardError, RewardResult
from rollout.catalog import Catalog
from rollout.types import RolloutGroup


@dataclass(frozen=True)
class Validity:
    """Whether the rollout writes items of the catalogue.

    Formula: 1 for a legal rollout, `illegal` for any other. Under the trie every rollout is legal and this is constant.

    Args:
        illegal: Value of an illegal rollout.
    """

    illegal: float = 0.0

    def __call__(self, group: RolloutGroup, catalog: Catalog) -> list[float]:
        """Value of each rollout."""
        return set_illegal(group, [1.0] * len(group), self.illegal)


@dataclass(frozen=True)
class Diversity:
    """How much the rollout differs from the others of its group.

    Formula, over the M legal of the G rollouts:
      item: `1 / (number of rollouts that wrote the same sid)`; the sum is the number of distinct sids.
      prefix: `-log(share of the rollouts with the same first levels) / log(G)`; the mean is the normalised entropy.
      category: the same for the category of the item.
      distance: mean of `(1 - cos) / 2` to the embeddings of the other M - 1 rollouts (intra-list distance).

    Edge cases: G = 1 gives 1 for item and 0 for the others; M = 1 gives distance 0. A sid that items of several
    categories share has the commonest one (the first row's in a tie); items without a category are one category. The
    embedding of a shared sid is the mean of its items' unit vectors, which makes the distance the expected one; an
    all-zero embedding is at .5 from everything. An illegal rollout gets `illegal`. A slate gets the mean over its own
    sids, as if they were the group. The part `list` is the mean over the legal rollouts (a slate's own).

    Args:
        of: item, prefix, category (needs categories) or distance (needs embeddings).
        levels: Leading levels that of=prefix compares.
        illegal: Value of an illegal rollout.
    """

    of: Literal["item", "prefix", "category", "distance"] = "item"
    levels: int = 1
    illegal: float = 0.0

    def __post_init__(self) -> None:
        if self.of not in ("item", "prefix", "category", "distance"):
            raise RewardError(f"of={self.of!r} must be item, prefix, category or distance")
        if not isinstance(self.levels, int) or self.levels < 1:
            raise RewardError(f"levels={self.levels!r} must be a whole number of at least 1")

    def __call__(self, group: RolloutGroup, catalog: Catalog) -> RewardResult:
        """Value of each rollout; the part `list` is the diversity of the list that it stands in."""
        self._require(catalog)
        if holds_slates(group):
            slates = [_mean(self._values(rollout.sids, len(rollout.sids), catalog)) for rollout in group.rollouts]
            return RewardResult(set_illegal(group, slates, self.illegal), {"list": slates})
        written = [sid for rollout in group.rollouts for sid in rollout.sids]
        values = self._values(written, len(group), catalog)
        in_order = iter(values)
        result = [next(in_order) if rollout.legal else self.illegal for rollout in group.rollouts]
        return RewardResult(result, {"list": [_mean(values)] * len(group)})

    def _require(self, catalog: Catalog) -> None:
        if self.of == "distance" and catalog.embeddings_ND is None:
            raise RewardError("of='distance' needs item embeddings, and the catalogue has none")
        if self.of == "category" and not any(catalog.categories):
            raise RewardError("of='category' needs item categories, and the catalogue has none")
        if self.of == "prefix" and self.levels > catalog.format.depth:
            raise RewardError(f"levels={self.levels} is more than the {catalog.format.depth} levels of the sids")

    def _values(self, sids: Sequence[int], size: int, catalog: Catalog) -> list[float]:
        """Value of each entry of a list in which sids may repeat; `size` counts the illegal ones too."""
        if self.of == "distance":
            return _mean_distances(sids, catalog)
        buckets = [self._bucket(sid, catalog) for sid in sids]
        count = Counter(buckets)
        if self.of == "item":
            return [1 / count[bucket] for bucket in buckets]
        # log(len / count) rather than -log(count / len): a list in one bucket gives 0.0 and not -0.0.
        return [math.log(len(sids) / count[bucket]) / math.log(size) if size > 1 else 0.0 for bucket in buckets]

    def _bucket(self, sid: int, catalog: Catalog) -> Hashable:
        if self.of == "item":
            return sid
        if self.of == "prefix":
            return tuple(catalog.sids_SL[sid, : self.levels].tolist())
        return Counter(catalog.categories[item] for item in catalog.items_of_sid(sid)).most_common(1)[0][0]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _mean_distances(sids: Sequence[int], catalog: Catalog) -> list[float]:
    """Mean of (1 - cos) / 2 from each entry to the others; 0 where there is no other. M entries."""
    assert catalog.embeddings_ND is not None
    if len(sids) < 2:
        return [0.0] * len(sids)
    vectors_MD = np.stack([_mean_unit_vector(catalog.embeddings_ND[list(catalog.items_of_sid(sid))]) for sid in sids])
    distances_MM = (1 - vectors_MD @ vectors_MD.T) / 2
    np.fill_diagonal(distances_MM, 0.0)
    means: list[float] = (distances_MM.sum(axis=1) / (len(sids) - 1)).clip(0.0, 1.0).tolist()
    return means


def _mean_unit_vector(embeddings_ND: np.ndarray) -> np.ndarray:
    wide_ND = embeddings_ND.astype(np.float64)
    norms_N1 = np.linalg.norm(wide_ND, axis=1, keepdims=True)
    mean: np.ndarray = np.divide(wide_ND, norms_N1, out=np.zeros_like(wide_ND), where=norms_N1 != 0).mean(axis=0)
    return mean


class Popularity:
    """How little-known the item is (novelty).

    Formula: `1 - log(1 + pop) / log(1 + max pop)`: 1 for an item that nobody had, 0 for the most popular one; the mean
    over the items of a shared sid.

    Edge cases: a catalogue without interaction counts is an error. An illegal rollout gets `illegal`. A slate gets the
    mean over its sids.

    Args:
        illegal: Value of an illegal rollout.
    """

    def __init__(self, illegal: float = 0.0) -> None:
        """See the class."""
        self.illegal = illegal
        self._scale: tuple[Catalog, float] | None = None  # the maximum takes a pass over all items: once a catalogue

    def __call__(self, group: RolloutGroup, catalog: Catalog) -> list[float]:
        """Value of each rollout."""
        if self._scale is None or self._scale[0] is not catalog:
            self._scale = catalog, float(np.log1p(catalog.popularity_N.max()))
        scale = self._scale[1]
        if scale <= 0:
            raise RewardError("it needs interaction counts, and the catalogue's popularity is 0 for every item")

        def novelty(items: tuple[int, ...]) -> float:
            return 1 - float(np.log1p(catalog.popularity_N[list(items)]).mean()) / scale

        novelties = [list(map(novelty, rollout.items)) for rollout in group.rollouts]
        return set_illegal(group, list(map(_mean, novelties)), self.illegal)


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft punishment of free text that nears its limit (arXiv 2503.14476, eq. 13).

    Formula, for n tokens of free text: 0 up to `max_tokens - buffer`, then `(max_tokens - buffer - n) / buffer` down to
    -1 at `max_tokens`, and -1 beyond.

    Edge cases: tokens of items do not count, so a completion that is an item alone gets 0, legal or not.

    Args:
        max_tokens: Tokens of free text at which the punishment is full.
        buffer: Tokens before that over which it grows.
    """

    max_tokens: int
    buffer: int

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.max_tokens:
            raise RewardError(f"buffer={self.buffer!r} must be above 0 and at most max_tokens={self.max_tokens!r}")

    def __call__(self, group: RolloutGroup, catalog: Catalog) -> list[float]:
        """Punishment of each rollout."""
        lengths = [rollout.text_tokens for rollout in group.rollouts]
        free = self.max_tokens - self.buffer
        return [max(-1.0, min(0.0, (free - length) / self.buffer)) for length in lengths]
