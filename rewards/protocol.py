"""What a reward is, what it may return, and what scoring makes of a group."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import __file__ as importlib_file
from typing import Protocol

from rollout.catalog import Catalog
from rollout.types import RolloutGroup


class RewardError(ValueError):
    """A reward that cannot be built, or that failed on a group. The message names the reward."""


@dataclass(frozen=True)
class RewardResult:
    """Values of a reward together with the parts it is made of.

    Attributes:
        values: one number per rollout of the group.
        parts: named per-rollout numbers that are logged and do not count.
    """

    values: Sequence[float]
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)


class Reward(Protocol):
    """Anything that is called with a group and the catalogue and returns one number per rollout, in their order."""

    def __call__(self, group: RolloutGroup, catalog: Catalog, /) -> Sequence[float] | RewardResult:
        """The worth of each rollout, seen next to the others."""
        ...


@dataclass(frozen=True)
class ScoredGroup:
    """A RolloutGroup and what each of its rollouts is worth.

    Attributes:
        group: the group.
        rewards: values of each reward by its name, before weighting.
        parts: what the rewards report besides, by `<reward>/<part>`.
        total: weighted sum of the rewards.
    """

    group: RolloutGroup
    rewards: dict[str, tuple[float, ...]]
    parts: dict[str, tuple[float, ...]]
    total: tuple[float, ...]


def describe(error: BaseException) -> str:
    """An exception in one line, with the line of the plugin that raised it.

    Called where the exception was caught: the first frame is the catcher's, the next one that belongs to a file is the
    plugin's, and the deepest line in that file is shown (not the one in the library that it called).
    """
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno}: {(error.text or '').strip()})"
    frames = traceback.extract_tb(error.__traceback__)[1:]
    frames = [f for f in frames if not f.filename.startswith("<") and f.filename != importlib_file]
    said = f"{type(error).__name__}: {error}"
    if not frames:
        return said
    line = [f for f in frames if f.filename == frames[0].filename][-1]
    return f"{said} ({line.filename}, line {line.lineno}: {line.line})"
