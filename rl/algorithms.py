"""Algorithms: from the rewards of groups to advantages, and which loss TRL applies to them.

Axes: P prompts (groups), G rollouts of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from configs.schema import RunConfig

EPSILON = 1e-4  # as in TRL: keeps groups with nearly equal rewards from exploding


@dataclass(frozen=True)
class Algorithm:
    """One policy-gradient algorithm.

    Attributes:
        name: value of `--algo`.
        loss_type: TRL's name of the loss.
        scale_rewards: what advantages are divided by: the group's standard deviation, the batch's, or nothing.
    """

    name: str
    loss_type: str
    scale_rewards: str

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """Group-relative advantages [P, G] of rewards [P, G].

        GRPO (DeepSeekMath, arXiv 2402.03300, eq. 10): A_i = (r_i - mean(r)) / (std(r) + 1e-4), with the unbiased
        standard deviation of the group. `scale_rewards="batch"` divides by the standard deviation of all rewards of the
        batch instead (arXiv 2508.08221), `"none"` does not divide (Dr. GRPO, arXiv 2503.20783). A group whose rewards
        are all equal gets zeros.

        Raises:
            ValueError: when a group has fewer than two rollouts: there is nothing to compare with.
        """
        if rewards_PG.shape[1] < 2:
            raise ValueError(
                f"groups of {rewards_PG.shape[1]} rollout have no advantage; rollout.group_size must be >= 2"
            )
        centred = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
        if self.scale_rewards == "none":
            return centred
        std = rewards_PG.std(axis=1, ddof=1, keepdims=True) if self.scale_rewards == "group" else rewards_PG.std(ddof=1)
        return centred / (std + EPSILON)


def without_signal(rewards_PG: np.ndarray) -> np.ndarray:
    """Which groups [P] have equal rewards throughout, and so teach nothing."""
    return np.ptp(rewards_PG, axis=1) < 1e-12


def build_algorithm(config: RunConfig) -> Algorithm:
    """The algorithm that `algo` names."""
    return Algorithm(config.algo, {"grpo": "grpo"}[config.algo], config.rl.scale_rewards)
