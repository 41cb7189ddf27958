"""What a step's metrics tell of its rollouts and their rewards; docs/metrics.md says what each name means."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rewards.protocol import ScoredGroup
from rl.algorithms import without_signal
from rollout.types import RolloutGroup

Notes = dict[str, float]


def rollout_notes(groups: Sequence[RolloutGroup]) -> Notes:
    """Legality, variety and version of what was drawn; of thoughts their length and how many were closed by force."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    notes: dict[str, Any] = {
        "legal_rate": np.mean([rollout.legal for rollout in rollouts]),
        "distinct_items": np.mean([len({r.sids for r in group.rollouts}) / len(group) for group in groups]),
        "policy_version": groups[0].policy_version,
    }
    if any(rollout.thought >= 0 for rollout in rollouts):
        notes["text_tokens"] = np.mean([rollout.text_tokens for rollout in rollouts])
        notes["truncated"] = np.mean([rollout.truncated for rollout in rollouts])
    return {name: float(value) for name, value in notes.items()}


def score_notes(scored: Sequence[ScoredGroup]) -> Notes:
    """Means of each reward and its parts, and how much of the batch has a signal."""
    totals_PG = rewards_of(scored)
    notes: dict[str, Any] = {}
    notes |= {f"reward/{name}": np.mean([group.rewards[name] for group in scored]) for name in scored[0].rewards}
    notes |= {f"reward/{name}": np.mean([group.parts[name] for group in scored]) for name in scored[0].parts}
    notes |= {
        "reward": totals_PG.mean(),
        "reward_std": totals_PG.std(axis=1).mean(),
        "zero_signal_groups": without_signal(totals_PG).mean(),
    }
    return {name: float(value) for name, value in notes.items()}


def rewards_of(scored: Sequence[ScoredGroup]) -> np.ndarray:
    """Total rewards [P, G]."""
    return np.array([group.total for group in scored])


class Phases:
    """Seconds of a step by the phase they were spent in; `with phases("rollout"): …` counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count a block's seconds under a name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    def notes(self) -> Notes:
        """The seconds as metrics; counting starts anew."""
        notes = {f"seconds/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds.clear()
        return notes
