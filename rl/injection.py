"""Target injection: where no rollout of a group is a target, the last one gives way to one.

Sparse hits leave most groups without signal. With the target in the group its advantage is positive and all others'
negative, as in the groups that found it themselves. The target was not drawn from the policy, so an exact importance
ratio would be π(y) / 1: nearly zero where it is needed most. Instead its sampler log-probabilities are the policy's own
at the time, which starts its ratio at 1: the term is a supervised one, weighted by its advantage and clipped like the
rest. The gradient is therefore biased towards the targets, on purpose (cf. LUFFY, arXiv 2504.14945, off-policy
guidance without the shaping).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rollout.decode import Decoder
from rollout.search import sample_seed
from rollout.types import Rollout, RolloutGroup, Sample

LogpsOf = Callable[[Sequence[RolloutGroup]], np.ndarray]


def inject_targets(
    groups: Sequence[RolloutGroup], targets: Sequence[int], decoder: Decoder, logps_of: LogpsOf
) -> tuple[list[RolloutGroup], int]:
    """Groups without a hit get their target in place of the last rollout.

    Args:
        groups: what was drawn.
        targets: the item to inject for each group.
        decoder: catalogue and trie.
        logps_of: the policy's log-probabilities [N, L] of groups of one rollout.

    Returns:
        the groups, and in how many a target was put.
    """
    places = [index for index, group in enumerate(groups) if not _hit(group)]
    alone = [_target_alone(groups[place], targets[place], decoder) for place in places]
    result = list(groups)
    if alone:
        for place, group, logps in zip(places, alone, logps_of(alone), strict=True):
            rollout = replace(group.rollouts[0], logps_sampler=tuple(logps.tolist()))
            result[place] = RolloutGroup(group.sample, (*groups[place].rollouts[:-1], rollout))
    return result, len(places)


def draw_targets(samples: Sequence[Sample], seed: int) -> list[int]:
    """One target item of each sample that it may be recommended, drawn by gain where there are several."""
    drawn = []
    for sample in samples:
        gains = np.array(
            [g if sample.record.allows(t) else 0.0 for t, g in zip(sample.targets, sample.gains, strict=True)]
        )
        rng = np.random.default_rng([sample_seed(seed, sample), 2])
        drawn.append(int(rng.choice(sample.targets, p=gains / gains.sum())))
    return drawn


def _hit(group: RolloutGroup) -> bool:
    wanted = set(group.sample.targets)
    return any(item in wanted for rollout in group.rollouts for cluster in rollout.items for item in cluster)


def _target_alone(group: RolloutGroup, item: int, decoder: Decoder) -> RolloutGroup:
    sid = int(decoder.catalog.sid_index_N[item])
    path = decoder.path_of(sid)
    rollout = Rollout(
        token_ids=path,
        logps_sampler=(0.0,) * len(path),
        on_trie=(True,) * len(path),
        sids=(sid,),
        items=(decoder.items(group.sample.record, sid),),
        policy_version=group.policy_version,
        finish_reason="item",
    )
    return RolloutGroup(group.sample, (rollout,))
