"""Scores groups with the configured rewards, and trusts none of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs.schema import RewardConfig
from rewards.protocol import Reward, RewardError, RewardResult, ScoredGroup, describe
from rewards.registry import NamedReward, build
from rollout.catalog import Catalog
from rollout.types import Record, Rollout, RolloutGroup, Sample


class RewardSet:
    """The weighted rewards of a run. Building it tries each once: a broken one stops the run before it starts.

    Attributes:
        rewards: the rewards, in the order of the configuration.
        catalog: the items that they look up.
    """

    def __init__(self, configs: Sequence[RewardConfig], catalog: Catalog) -> None:
        """Builds and checks the rewards. Raises RewardError naming the first one that cannot be honoured."""
        self.rewards: tuple[NamedReward, ...] = tuple(build(configs))
        self.catalog = catalog
        self.check()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rewards, in order."""
        return tuple(reward.name for reward in self.rewards)

    def check(self) -> None:
        """Score a made-up group of one hit, one miss and one illegal rollout; raises RewardError as `score` does."""
        self.score([trial_group(self.catalog)])

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """Every group with the values of every reward and their weighted sum.

        Raises:
            RewardError: when a reward raises, or returns anything but one finite number per rollout. The message
                names the reward and the sample's source.
        """
        return [self._score(group) for group in groups]

    def _score(self, group: RolloutGroup) -> ScoredGroup:
        values: dict[str, tuple[float, ...]] = {}
        parts: dict[str, tuple[float, ...]] = {}
        for reward in self.rewards:
            try:
                result = _call(reward.call, group, self.catalog)
                values[reward.name] = _numbers(result.values, len(group))
                for part, numbers in result.parts.items():
                    parts[f"{reward.name}/{part}"] = _numbers(numbers, len(group), f"part {part!r}: ")
            except RewardError as error:
                raise RewardError(f"reward {reward.name!r}, {group.sample.record.source}: {error}") from error.__cause__
        columns = [[reward.weight * value for value in values[reward.name]] for reward in self.rewards]
        return ScoredGroup(group, values, parts, tuple(map(sum, zip(*columns, strict=True))))


def trial_group(catalog: Catalog) -> RolloutGroup:
    """A hit, a miss and an illegal rollout for a user who had the catalogue's last items (one sid alone: hit twice)."""
    depth = catalog.format.depth
    history = tuple(range(len(catalog))[-3:])
    sample = Sample(Record("trial call", "trial", history, catalog.items_of_sid(0)[:1], (1.0,)), (0,))
    logps, constrained = (-0.5,) * depth, (True,) * depth

    def legal(sid: int, logps: tuple[float, ...]) -> Rollout:
        return Rollout((0,) * depth, logps, constrained, (sid,), (catalog.items_of_sid(sid),), 0, "item")

    illegal = Rollout((0,) * depth, (-2.0,) * depth, (False,) * depth, (), (), 0, "illegal")
    return RolloutGroup(sample, (legal(0, logps), legal(len(catalog.sids_SL) - 1, (-1.0,) * depth), illegal))


def _call(reward: Reward, group: RolloutGroup, catalog: Catalog) -> RewardResult:
    try:
        returned = reward(group, catalog)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(describe(error)) from error
    result = returned if isinstance(returned, RewardResult) else RewardResult(returned)
    if not isinstance(result.parts, Mapping):
        raise RewardError(f"parts must be a dict of names to numbers, got {type(result.parts).__name__}")
    return result


def _numbers(returned: Any, size: int, what: str = "") -> tuple[float, ...]:
    """What a reward returned as Python floats, after checking that it is `size` finite numbers."""
    try:
        values = None if isinstance(returned, str | bytes | Mapping) else list(returned[:])
    except (TypeError, IndexError):  # not a sequence
        values = None
    if values is None:
        raise RewardError(f"{what}returned {_short(returned)}, must be a list of {size} numbers, one per rollout")
    if len(values) != size:
        raise RewardError(f"{what}returned {len(values)} values for {size} rollouts: {_short(returned)}")
    numbers = []
    for index, value in enumerate(values):
        try:
            number = None if isinstance(value, str | bytes) or np.ndim(value) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or not math.isfinite(number):
            raise RewardError(f"{what}returned {_short(value)} for rollout {index} of {size}, must be a finite number")
        numbers.append(number)
    return tuple(numbers)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '…'} ({type(value).__name__})"
