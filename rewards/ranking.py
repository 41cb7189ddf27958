"""The metrics of recommendation as rewards: ndcg, recall, hit, mrr.

A group whose rollouts write one sid each is one ranked list, `group.ranking()`: distinct sids, likeliest first, ranks
from 1. Each rollout gets the credit of its sid in that list, so duplicates of one sid get the same. In a group of
slates (some rollout writes several sids) each rollout gets the metric of its own list. Shared sids count in
expectation (see `rewards.groups.Targets`): a shared sid takes one place, which one of its items fills. Evaluation
(`rl/metrics.py`) lists all items of a shared sid instead; without collisions the two agree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from rewards.groups import Targets, holds_slates, set_illegal
from rewards.protocol import RewardError, RewardResult
from rollout.catalog import Catalog
from rollout.types import RolloutGroup

Cluster = tuple[int, ...]  # the items that share a sid


class _ListMetric(ABC):
    """A metric of a ranked list and the credit of each of its members. Subclasses are dataclasses with these fields."""

    k: int | None
    illegal: float

    def __post_init__(self) -> None:
        if self.k is not None and (not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1):
            raise RewardError(f"k={self.k!r} must be a whole number of at least 1, or None for the whole list")

    @abstractmethod
    def credits(self, ranked: Sequence[Cluster], targets: Targets, k: int) -> list[float]:
        """Credit of each member of a ranked list."""

    def metric(self, ranked: Sequence[Cluster], targets: Targets, k: int) -> float:
        """Metric of a ranked list."""
        return sum(self.credits(ranked, targets, k))

    def __call__(self, group: RolloutGroup, catalog: Catalog) -> RewardResult:
        """Credit of each rollout; the part `list` is the metric of the list that it stands in."""
        targets = Targets.of(group)
        lists = [dict(zip(rollout.sids, rollout.items, strict=True)) for rollout in group.rollouts]
        if holds_slates(group):
            k = self.k or max(map(len, lists))
            metrics = [self.metric(list(slate.values()), targets, k) for slate in lists]
            return RewardResult(set_illegal(group, metrics, self.illegal), {"list": metrics})
        clusters = {sid: items for one in lists for sid, items in one.items()}
        ranking, k = group.ranking(), self.k or len(group)
        ranked = [clusters[sid] for sid in ranking]
        credit_of = dict(zip(ranking, self.credits(ranked, targets, k), strict=True))
        credits = [sum(credit_of[sid] for sid in rollout.sids) for rollout in group.rollouts]
        metrics = [self.metric(ranked, targets, k)] * len(group)
        return RewardResult(set_illegal(group, credits, self.illegal), {"list": metrics})


@dataclass(frozen=True)
class Ndcg(_ListMetric):
    """The rollout's share in the NDCG@k of the group.

    Formula: `gain(sid) / log2(1 + rank) / IDCG` if rank <= k, else 0, with linear gain and IDCG the DCG of the sample's
    k largest gains. Over the distinct sids of a group the credits sum to NDCG@k (Järvelin & Kekäläinen 2002).

    credit="marginal" pays `NDCG@k(list) - NDCG@k(list without this sid)` instead, the difference reward (Wolpert &
    Tumer 2002): what comes below moves up when a sid is taken out, so a miss ranked above a hit gets less than 0.

    Edge cases: an illegal rollout gets `illegal` and takes no rank. With more targets than k a list of k hits still
    reaches 1. A shared sid counts its expected gain, so with collisions the best list can stay below 1. A slate gets
    the NDCG of its own list under either credit.

    Args:
        k: Length of the list that counts; None is the group size (for slates, the longest slate).
        credit: gain or marginal.
        illegal: Value of an illegal rollout.
    """

    k: int | None = None
    credit: Literal["gain", "marginal"] = "gain"
    illegal: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.credit not in ("gain", "marginal"):
            raise RewardError(f"credit={self.credit!r} must be gain or marginal")

    def credits(self, ranked: Sequence[Cluster], targets: Targets, k: int) -> list[float]:
        """Share of each member in the NDCG, or the difference that it makes."""
        gains, discounts = self._normalised_gains(ranked, targets, k), _discounts(len(ranked), k)
        credits = gains * discounts
        if self.credit == "marginal":
            # Without rank r every later rank j moves from discount j to discount j - 1.
            rises = gains[1:] * (discounts[:-1] - discounts[1:])
            credits[:-1] -= np.cumsum(rises[::-1])[::-1]
        return list(map(float, credits))

    def metric(self, ranked: Sequence[Cluster], targets: Targets, k: int) -> float:
        """NDCG@k of a ranked list."""
        return float(self._normalised_gains(ranked, targets, k) @ _discounts(len(ranked), k))

    def _normalised_gains(self, ranked: Sequence[Cluster], targets: Targets, k: int) -> np.ndarray:
        best = np.sort(list(targets.gain_of_item.values()))[::-1]
        ideal = float(best @ _discounts(len(best), k))
        return np.array([targets.gain(items) for items in ranked], dtype=np.float64) / ideal


def _discounts(length: int, k: int) -> np.ndarray:
    ranks = np.arange(1, length + 1)
    return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


@dataclass(frozen=True)
class Recall(_ListMetric):
    """The rollout's share in the Recall@k of the group.

    Formula: `P(sid is a target) / number of targets` if rank <= k, else 0. Over the distinct sids of a group the
    credits sum to Recall@k. Gains do not count.

    Edge cases: with more targets than k the metric stays below 1 (the divisor is all targets). An illegal rollout gets
    `illegal` and takes no rank. A slate gets the recall of its own list.

    Args:
        k: Length of the list that counts; None is the group size (for slates, the longest slate).
        illegal: Value of an illegal rollout.
    """

    k: int | None = None
    illegal: float = 0.0

    def credits(self, ranked: Sequence[Cluster], targets: Targets, k: int) -> list[float]:
        """Expected share of the targets that each member brings.

        A sid with n items, of which t are targets, brings one of them with probability t / n.
        """
        return _cut([targets.probability(items) / len(targets.gain_of_item) for items in ranked], k)


@dataclass(frozen=True)
class Hit(_ListMetric):
    """Whether the rollout is a target, within the first k of the group.

    Formula: `P(sid is a target)` if rank <= k, else 0. The part `list` is the hit rate of the whole list,
    `1 - prod(1 - P)`. Gains do not count. Without k it is the exact-match reward of most peers.

    Edge cases: an illegal rollout gets `illegal` and takes no rank. A slate gets the hit rate of its own list.

    Args:
        k: Length of the list that counts; None is the group size (for slates, the longest slate).
        illegal: Value of an illegal rollout.
    """

    k: int | None = None
    illegal: float = 0.0

    def credits(self, ranked: Sequence[Cluster], targets: Targets, k: int) -> list[float]:
        """Probability that each member is a target."""
        return _cut([targets.probability(items) for items in ranked], k)

    def metric(self, ranked: Sequence[Cluster], targets: Targets, k: int) -> float:
        """Probability that some member is a target."""
        return targets.any_probability(ranked[:k])


@dataclass(frozen=True)
class Mrr(_ListMetric):
    """The reciprocal rank of the group's first hit, paid to the rollouts that wrote it.

    Formula: `P(sid is the first hit) / rank`, the probability being P(target) times the product of 1 - P(target) over
    the ranks above. Without collisions that is 1 / rank for the first hit and 0 for all others. Over the distinct sids
    of a group the credits sum to the expected reciprocal rank, 0 when there is no hit. Gains do not count.

    Edge cases: an illegal rollout gets `illegal` and takes no rank. A slate gets the reciprocal rank of its own list.

    Args:
        k: Hits below rank k count nothing; None is the group size (for slates, the longest slate).
        illegal: Value of an illegal rollout.
    """

    k: int | None = None
    illegal: float = 0.0

    def credits(self, ranked: Sequence[Cluster], targets: Targets, k: int) -> list[float]:
        """Expected reciprocal rank that each member brings."""
        hits = [targets.probability(items) for items in ranked]
        none_above = accumulate(hits, lambda left, hit: left * (1 - hit), initial=1.0)
        chances = zip(hits, none_above, strict=False)  # one more of the latter: no hit in the whole list
        return _cut([hit * left / rank for rank, (hit, left) in enumerate(chances, start=1)], k)


def _cut(credits: list[float], k: int) -> list[float]:
    return credits[:k] + [0.0] * len(credits[k:])
