"""What rewards read off a group: what its sids are worth, whether it holds slates, which rollouts are illegal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rollout.types import RolloutGroup


@dataclass(frozen=True)
class Targets:
    """The targets of a sample.

    A sid stands for all n items that share it, and which of them is shown is a fair draw: gains and probabilities are
    expectations over that draw.

    Attributes:
        gain_of_item: gain of each target.
    """

    gain_of_item: dict[int, float]

    @classmethod
    def of(cls, group: RolloutGroup) -> Targets:
        """The targets of a group's sample."""
        return cls(dict(zip(group.sample.targets, group.sample.gains, strict=True)))

    def gain(self, items: tuple[int, ...]) -> float:
        """Expected gain of a sid that these n items share: (sum of the gains of its targets) / n."""
        return sum(self.gain_of_item.get(item, 0.0) for item in items) / len(items)

    def probability(self, items: tuple[int, ...]) -> float:
        """Probability that a sid that these n items share is a target: (its targets) / n."""
        return sum(item in self.gain_of_item for item in items) / len(items)

    def any_probability(self, sids: Iterable[tuple[int, ...]]) -> float:
        """Probability that at least one of several sids is a target; 0 for none."""
        return 1 - math.prod(1 - self.probability(items) for items in sids)


def holds_slates(group: RolloutGroup) -> bool:
    """Whether some rollout writes several sids: then each rollout is a list of its own, else the group is one list."""
    return any(len(rollout.sids) > 1 for rollout in group.rollouts)


def set_illegal(group: RolloutGroup, values: Sequence[float], illegal: float) -> list[float]:
    """The values with those of illegal rollouts replaced."""
    return [value if rollout.legal else illegal for rollout, value in zip(group.rollouts, values, strict=True)]
