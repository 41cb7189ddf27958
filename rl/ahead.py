"""Rollouts of later steps, drawn while this step updates the policy (`rollout.max_staleness`).

With a staleness of n batches, the rollouts of a batch are asked for n batches early, with the weights of that time; the
importance ratio to what they were drawn from corrects for it. Engines take their calls in order, so the version of each
batch is known when it is asked for. With 0 nothing is asked for early, and rollouts are exactly on-policy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rollout.ray_fleet import Fleet, Pending
from rollout.types import Rollout, RolloutGroup, Sample, Sampling

FILE = "rollouts_ahead.json"


class RolloutsAhead:
    """Batches that are under way.

    Args:
        fleet: the engines.
        staleness: how many batches ahead rollouts may be asked for.
        every: optimizer steps a batch serves.
        last: step after which nothing is asked for.
        samples_of: the prompts of the batch that starts at a step.
        sampling_of: how its rollouts are drawn.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        staleness: int,
        every: int,
        last: int,
        samples_of: Callable[[int], list[Sample]],
        sampling_of: Callable[[int], Sampling],
    ) -> None:
        self.fleet, self.staleness, self.every, self.last = fleet, staleness, every, last
        self.samples_of, self.sampling_of = samples_of, sampling_of
        self.under_way: dict[int, Pending | list[RolloutGroup]] = {}

    def take(self, step: int, samples: list[Sample]) -> Iterator[list[RolloutGroup]]:
        """The rollouts of the batch that starts at a step, in order, some at a time; later ones are asked for first.

        Raises:
            RuntimeError: when the prompts are not those that were asked for, or the rollouts are older than allowed.
        """
        asked = [(step, samples)] if step not in self.under_way else []
        ahead = range(step + self.every, min(step + self.staleness * self.every, self.last - 1) + 1, self.every)
        asked += [(later, self.samples_of(later)) for later in ahead if later not in self.under_way]
        for at, batch in asked:
            self.under_way[at] = self.fleet.start(batch, self.sampling_of(at))
        for groups in self._arriving(self.under_way.pop(step)):
            if [group.sample for group in groups] != samples[: len(groups)]:
                raise RuntimeError(f"step {step}: rollouts were asked for other prompts than TRL's loop now takes")
            if any(step - group.policy_version > self.staleness * self.every for group in groups):
                raise RuntimeError(f"step {step}: rollouts of policy version {groups[0].policy_version} are too old")
            samples = samples[len(groups) :]
            yield groups

    def save(self, folder: Path) -> None:
        """Wait for what is under way and write it beside a checkpoint."""
        if not self.staleness:
            return
        self.under_way = {step: self._whole(batch) for step, batch in self.under_way.items()}
        plain = {
            str(step): [[asdict(rollout) for rollout in group.rollouts] for group in self._whole(batch)]
            for step, batch in self.under_way.items()
        }
        (folder / FILE).write_text(json.dumps(plain))

    def load(self, folder: Path) -> None:
        """The counterpart of `save`.

        Raises:
            ValueError: when the checkpoint is of a run without `rollout.max_staleness`.
        """
        if not self.staleness:
            return
        try:
            plain = json.loads((folder / FILE).read_text())
        except OSError as error:
            raise ValueError(
                f"{folder} holds no rollouts ahead: it is of a run with rollout.max_staleness=0"
            ) from error
        self.under_way = {
            int(step): [
                RolloutGroup(sample, tuple(_rollout(one) for one in rollouts))
                for sample, rollouts in zip(self.samples_of(int(step)), groups, strict=True)
            ]
            for step, groups in plain.items()
        }

    def _arriving(self, batch: Pending | list[RolloutGroup]) -> Iterator[list[RolloutGroup]]:
        return iter([batch]) if isinstance(batch, list) else self.fleet.collect(batch)

    def _whole(self, batch: Pending | list[RolloutGroup]) -> list[RolloutGroup]:
        return [group for groups in self._arriving(batch) for group in groups]


def _rollout(plain: dict[str, Any]) -> Rollout:
    """A rollout from JSON, which knows lists only."""
    known = {field.name: plain[field.name] for field in fields(Rollout)}
    return Rollout(**{name: _tuples(value) for name, value in known.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
