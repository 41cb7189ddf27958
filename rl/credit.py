"""Rewards of single tokens: credit for each level of an item on which it still is a target.

Axes: P groups, G rollouts, T completion tokens (padded), L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.protocol import ScoredGroup
from rollout.catalog import Catalog
from rollout.types import Rollout


def token_rewards(scored: Sequence[ScoredGroup], catalog: Catalog, prefix_credit: float, length: int) -> np.ndarray:
    """Rewards [P, G, T]: the total of a rollout at its last token, prefix credit before.

    An item whose first l codes are those of a target earns `prefix_credit` at its l-th token, for l = 1 … L - 1 (the
    last level decides about the item itself, which is the rewards' business). Several targets: any of them counts. An
    illegal rollout earns none. The credit of a rollout is at most (L - 1) · `prefix_credit` an item.
    """
    rewards_PGT = np.zeros((len(scored), len(scored[0].group), length))
    for row, one in zip(rewards_PGT, scored, strict=True):
        targets_SL = catalog.codes_NL[list(one.group.sample.targets)]
        for tokens, rollout, total in zip(row, one.group.rollouts, one.total, strict=True):
            if prefix_credit:
                tokens[: len(rollout.token_ids)] += prefix_credit * _on_target(rollout, catalog, targets_SL)
            tokens[len(rollout.token_ids) - 1] += total
    return rewards_PGT


def rewards_to_go(rewards_PGT: np.ndarray) -> np.ndarray:
    """What is still to be earned from each token on, itself included, [P, G, T]."""
    return np.flip(np.flip(rewards_PGT, axis=-1).cumsum(axis=-1), axis=-1)


def _on_target(rollout: Rollout, catalog: Catalog, targets_SL: np.ndarray) -> np.ndarray:
    """Which tokens [T] of a rollout keep an item on the way to a target, the item's last token left out."""
    found = np.zeros(len(rollout.token_ids))
    places = np.flatnonzero(rollout.on_trie)
    depth = catalog.format.depth
    for index, sid in enumerate(rollout.sids):
        matched = (targets_SL == catalog.sids_SL[sid]).cumprod(axis=1).sum(axis=1).max()
        levels = min(int(matched), depth - 1)
        found[places[index * depth : index * depth + levels]] = 1.0
    return found
