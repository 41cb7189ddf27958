"""Rewards of published systems, as they define them: rank_penalty (MiniOneRec), prefix (GREAM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.groups import Targets
from rewards.protocol import RewardError, RewardResult
from rollout.catalog import Catalog
from rollout.types import RolloutGroup


@dataclass(frozen=True)
class RankPenalty:
    """MiniOneRec's `ranking`: exact match, and a penalty on misses that is larger the likelier they were.

    Formula: a hit gets P(sid is a target), 1 without collisions. In a group with a hit the miss at position i gets
    `-(1 / log2(i + 2)) / sum over j < G of 1 / log2(j + 2)`; in a group without one it gets 0. Position i counts from
    0 over all G rollouts by log-probability, likeliest first, ties in the group's order (there: the beam's index).
    Source: MiniOneRec (arXiv:2510.24431), `rule_reward` plus `ndcg_rule_reward`.

    Edge cases: duplicates take a position each and an illegal rollout is a miss like any other, as there; a value for
    `illegal` replaces that (0 would pay garbage more than a miss). A slate is a hit with the probability that it holds
    a target. The parts are `match` and `penalty`.

    Args:
        illegal: Value of an illegal rollout; None treats it as a miss.
    """

    illegal: float | None = None

    def __call__(self, group: RolloutGroup, catalog: Catalog) -> RewardResult:
        """Match plus penalty of each rollout."""
        targets = Targets.of(group)
        match = np.array([targets.any_probability(rollout.items) for rollout in group.rollouts])
        weights = 1 / np.log2(np.arange(len(group)) + 2)
        penalty = np.zeros(len(group))
        if match.any():
            penalty[np.argsort([-rollout.logp for rollout in group.rollouts], kind="stable")] = -weights / weights.sum()
            penalty[match > 0] = 0.0
        if self.illegal is not None:
            penalty[[not rollout.legal for rollout in group.rollouts]] = self.illegal
        return RewardResult((match + penalty).tolist(), {"match": match.tolist(), "penalty": penalty.tolist()})


@dataclass(frozen=True)
class Prefix:
    """Credit for the leading levels that the sid shares with the nearest target.

    Formula: `credits[m - 1]` for m matched levels (the last credit for all deeper ones), 0 for none, 1 for the whole
    sid. The default is GREAM's table. It compares sids: items that share the target's sid count in full, and gains do
    not count.

    Edge cases: with several targets the longest match counts. An illegal rollout gets `illegal`. A slate gets the mean
    over its sids.

    Args:
        credits: Credit for 1, 2, 3, … matched levels short of the whole sid.
        illegal: Value of an illegal rollout.
    """

    credits: Sequence[float] = (0.5, 0.707, 0.866, 0.95)
    illegal: float = 0.0

    def __post_init__(self) -> None:
        numbers = isinstance(self.credits, list | tuple) and all(isinstance(c, int | float) for c in self.credits)
        if not numbers or not self.credits:
            raise RewardError(f"credits={self.credits!r} must be a list of at least one number")

    def __call__(self, group: RolloutGroup, catalog: Catalog) -> list[float]:
        """Credit of each rollout."""
        targets_TL = catalog.codes_NL[list(group.sample.targets)]
        depth = catalog.format.depth

        def credit(sid: int) -> float:
            matched = int(np.cumprod(targets_TL == catalog.sids_SL[sid], axis=1).sum(axis=1).max())
            if matched in (0, depth):
                return float(matched == depth)
            return self.credits[min(matched, len(self.credits)) - 1]

        credits = [list(map(credit, rollout.sids)) for rollout in group.rollouts]
        return [sum(mine) / len(mine) if mine else self.illegal for mine in credits]
