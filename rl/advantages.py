"""Advantages of a batch: the algorithm's own, and what settings make of them.

Axes: P prompts, G rollouts of a prompt, N thoughts of a prompt, M rollouts of a thought, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from configs.schema import RunConfig
from rewards.protocol import ScoredGroup
from rl.algorithms import Algorithm
from rl.credit import rewards_to_go, token_rewards
from rl.notes import rewards_of
from rollout.catalog import Catalog


def group_advantages(
    scored: Sequence[ScoredGroup], config: RunConfig, algorithm: Algorithm, catalog: Catalog, length: int
) -> np.ndarray:
    """Advantages [P, G] of the rollouts, or [P, G, T] where tokens differ."""
    if config.thought.rollouts > 1:
        return nested_advantages(scored, algorithm, config.thought.rollouts, length)
    if config.rl.inclusion_weights:
        rollouts = [group.group.rollouts for group in scored]
        logps_PG = np.array([[rollout.logp_items for rollout in group] for group in rollouts])
        inclusion_PG = np.array([[rollout.logp_inclusion for rollout in group] for group in rollouts])
        return inclusion_advantages(rewards_of(scored), logps_PG, inclusion_PG)
    if config.rl.prefix_credit:  # what is still to be earned from each token on, compared with the group's others
        to_go_PGT = rewards_to_go(token_rewards(scored, catalog, config.rl.prefix_credit, length))
        return np.stack([algorithm.advantages(to_go_PG) for to_go_PG in np.moveaxis(to_go_PGT, 2, 0)], 2)
    return algorithm.advantages(rewards_of(scored))


def inclusion_advantages(rewards_PG: np.ndarray, logps_PG: np.ndarray, inclusion_PG: np.ndarray) -> np.ndarray:
    """Advantages [P, G] that make the policy gradient of items drawn without replacement unbiased.

    The group is not a sample of the policy: likely items are in it less often than G draws would have them, so plain
    averages over it are biased. With p the probability of an item and q that of being in the group (`logp_inclusion`),

        ∇E[r] ≈ Σ_i (p_i / q_i) · (r_i · (1 - p_i + p_i / q_i) - B) · ∇log p_i,   B = Σ_j (p_j / q_j) · r_j

    is unbiased, baseline included (Kool et al., Buy 4 REINFORCE Samples, Get a Baseline for Free!, 2019). Times G,
    since the loss averages over the group.
    """
    weight_PG = np.exp(logps_PG - inclusion_PG)
    baseline_P1 = (weight_PG * rewards_PG).sum(axis=1, keepdims=True)
    centred_PG = rewards_PG * (1 - np.exp(logps_PG) + weight_PG) - baseline_P1
    return rewards_PG.shape[1] * weight_PG * centred_PG


def nested_advantages(scored: Sequence[ScoredGroup], algorithm: Algorithm, rollouts: int, length: int) -> np.ndarray:
    """Advantages [P, G, T] of N thoughts with M rollouts each.

    A token of items gets the advantage of its rollout among the M that continue the same thought; a token of a thought
    gets the advantage of that thought's mean reward among the N. Both baselines are means of what was drawn under the
    same condition, so neither biases the gradient. Groups that did not think get advantages among all G.
    """
    totals_PG = np.array([group.total for group in scored])
    plain_PG = algorithm.advantages(totals_PG)
    by_thought_PNM = totals_PG.reshape(len(scored), -1, rollouts)
    within_PG = algorithm.advantages(by_thought_PNM.reshape(-1, rollouts)).reshape(totals_PG.shape)
    across_PG = np.repeat(algorithm.advantages(by_thought_PNM.mean(axis=2)), rollouts, axis=1)
    result_PGT = np.zeros((*totals_PG.shape, length))
    for row, group in enumerate(scored):
        for column, rollout in enumerate(group.group.rollouts):
            if rollout.thought < 0:
                result_PGT[row, column] = plain_PG[row, column]
            else:
                result_PGT[row, column, : rollout.thought_tokens] = across_PG[row, column]
                result_PGT[row, column, rollout.thought_tokens :] = within_PG[row, column]
    return result_PGT
