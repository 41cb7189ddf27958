"""Algorithms: from the rewards of groups to advantages, and which loss TRL applies to them.

All of them are the policy gradient of group-relative advantages; they differ in the baseline, in what advantages are
divided by, in how token losses are averaged, and in what is done with the importance ratio
ρ_t = π(y_t) / π_sampler(y_t), both on the trie's support.

Axes: P prompts (groups), G rollouts of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        baseline: `mean` of the group, or `leave_one_out`, the mean of the others.
        ratio_level: whether the importance ratio is taken per token or per sequence (its length-normalised product).
        importance: False drops the ratio: the plain policy gradient.
        share_of_signal: multiply by P / (groups with signal), so that groups that teach nothing do not weaken the rest.
    """

    name: str
    loss_type: str
    scale_rewards: str = "group"
    baseline: str = "mean"
    ratio_level: str = "token"
    importance: bool = True
    share_of_signal: bool = False

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """Group-relative advantages [P, G] of rewards [P, G].

        With the defaults (GRPO): A_i = (r_i - mean(r)) / (std(r) + 1e-4), with the unbiased standard deviation of the
        group. `scale_rewards="batch"` divides by the standard deviation of all rewards of the batch instead (arXiv
        2508.08221), `"none"` does not divide. `baseline="leave_one_out"` takes r_i - mean_{j≠i}(r_j), which is
        G / (G - 1) times the former. A group whose rewards are all equal gets zeros.

        Raises:
            ValueError: when a group has fewer than two rollouts: there is nothing to compare with.
        """
        groups, size = rewards_PG.shape
        if size < 2:
            raise ValueError(f"groups of {size} rollout have no advantage; rollout.group_size must be >= 2")
        advantages_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
        if self.baseline == "leave_one_out":
            advantages_PG = advantages_PG * size / (size - 1)
        if self.scale_rewards == "group":
            advantages_PG = advantages_PG / (rewards_PG.std(axis=1, ddof=1, keepdims=True) + EPSILON)
        elif self.scale_rewards == "batch":
            advantages_PG = advantages_PG / (rewards_PG.std(ddof=1) + EPSILON)
        if self.share_of_signal:
            advantages_PG = advantages_PG * groups / max(groups - int(without_signal(rewards_PG).sum()), 1)
        return advantages_PG


GRPO = Algorithm("grpo", "grpo")
"""GRPO (DeepSeekMath, arXiv 2402.03300, eqs. 3 and 10): token-level clipped ratio, losses averaged within a completion,
then over completions. Reference values: clip .2, G 64, KL .04, lr 1e-6."""

DR_GRPO = Algorithm("dr_grpo", "dr_grpo")
"""Dr. GRPO (arXiv 2503.20783): no division by the standard deviation (its YAML sets `rl.scale_rewards: none`), token
losses summed and divided by a constant length, so that neither length nor difficulty weighs a prompt."""

RLOO = Algorithm("rloo", "dr_grpo", baseline="leave_one_out")
"""RLOO (arXiv 2402.14740): REINFORCE with the mean of the other rollouts as baseline, which leaves it unbiased;
`rl.scale_rewards: none`. Reference values: G 2 to 4, lr 1e-6, KL .03."""

GSPO = Algorithm("gspo", "grpo", ratio_level="sequence")
"""GSPO (arXiv 2507.18071, eq. 5): the ratio of the whole sequence, (π(y) / π_sampler(y))^(1/T), clipped once a
completion. Reference values: clip 3e-4 / 4e-4."""

CISPO = Algorithm("cispo", "cispo")
"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4): -sg(min(ρ, ε_high)) · A · log π; the weight is clipped, no token's
gradient is dropped. Reference value: ε_high 5 (`rl.clip_high`)."""

DAPO = Algorithm("dapo", "dapo")
"""DAPO (arXiv 2503.14476): clip-higher (.2 / .28), one average over all tokens of the batch, no KL, dynamic sampling
(`rl.refill_rounds`): groups without signal are replaced by fresh prompts."""

GPG = Algorithm("gpg", "bnpo", importance=False, share_of_signal=True)
"""GPG (arXiv 2504.02546, eq. 6): the plain policy gradient -A · log π averaged over tokens, with no ratio, clip or
reference, and advantages multiplied by the inverse share of groups with signal."""

PPO = Algorithm("ppo", "bnpo")
"""PPO (arXiv 1707.06347, eq. 7): the clipped ratio with advantages per token from a critic (`rl/trl_ppo.py`), averaged
over tokens. Reference values: clip .2, GAE λ .95, γ 1 for language models, value coefficient .5 (.1 in InstructGPT)."""

PL = Algorithm("pl", "grpo", baseline="leave_one_out")
"""PL (`rl/trl_ranking.py`): a rollout is a whole ranking, drawn from the Plackett-Luce model of item probabilities,
log π(σ) = Σ_r log(p_σ(r) / (1 - Σ_{j<r} p_σ(j))); the clipped ratio is that of rankings. Reference value: clip .2."""

ALGORITHMS = {algorithm.name: algorithm for algorithm in (GRPO, DR_GRPO, RLOO, GSPO, CISPO, DAPO, GPG, PPO, PL)}


def without_signal(rewards_PG: np.ndarray) -> np.ndarray:
    """Which groups [P] have equal rewards throughout, and so teach nothing."""
    return np.ptp(rewards_PG, axis=1) < 1e-12


def build_algorithm(config: RunConfig) -> Algorithm:
    """The algorithm that `algo` names, with the settings of the run."""
    return replace(ALGORITHMS[config.algo], scale_rewards=config.rl.scale_rewards)
