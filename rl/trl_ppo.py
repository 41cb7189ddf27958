"""PPO: SidTrainer with a critic, advantages per token, and the KL in the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from rewards.protocol import ScoredGroup
from rl.batch import Batch
from rl.credit import token_rewards
from rl.critic import Critic, explained_variance, gae, value_loss, whitened
from rl.scoring import TokenScores
from rl.trl_trainer import SidTrainer
from rollout.types import RolloutGroup


class PPOTrainer(SidTrainer):
    """Proximal policy optimisation (arXiv 1707.06347) on the trie's support.

    Token rewards are the total at the last token, `rl.prefix_credit` on the way, and -`rl.kl_coef` · log(π_sampler /
    π_reference) at each token (arXiv 2203.02155). Advantages are GAE's, whitened over the batch; the loss of the policy
    is TRL's clipped one, to which the critic's clipped value loss is added.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """As SidTrainer."""
        super().__init__(*arguments, **named)
        self.beta = 0.0  # the KL is in the reward, not in the loss
        set_seed(self.config.seed)
        width = self.policy.config.get_text_config().hidden_size
        self.critic = Critic(self.config.critic, width, self.task.tokenizer).to(self.accelerator.device)

    def create_optimizer(self, *arguments: Any, **named: Any) -> torch.optim.Optimizer:
        """TRL's optimizer with the critic as a group of its own; the schedule scales both learning rates alike."""
        optimizer = super().create_optimizer(*arguments, **named)
        parameters = list(self.critic.parameters())
        optimizer.add_param_group(
            {"params": parameters, "lr": self.config.critic.learning_rate, "weight_decay": self.args.weight_decay}
        )

        def clip(*_: Any) -> None:
            if self.config.rl.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, self.config.rl.max_grad_norm)

        optimizer.register_step_pre_hook(clip)
        optimizer.register_step_post_hook(lambda *_: self.critic.zero_grad())  # the loop zeroes the policy's alone
        return optimizer

    def pack(self, groups: list[RolloutGroup]) -> Batch:
        """With the reference's log-probabilities, for the KL in the reward."""
        batch = super().pack(groups)
        if self.config.rl.kl_coef:
            batch["reference_logps"] = self.reference_logps(batch)
        return batch

    def advantages(self, scored: list[ScoredGroup], batch: Batch) -> torch.Tensor:
        """GAE [B, T]; puts `values` and `returns` into the batch for the value loss."""
        rl, mask_BT = self.config.rl, batch["completion_mask"]
        catalog, length = self.task.decoder.catalog, mask_BT.shape[1]
        rewards_PGT = token_rewards(scored, catalog, rl.prefix_credit, length)
        rewards_BT = torch.from_numpy(rewards_PGT).float().flatten(0, 1).to(mask_BT.device)
        if rl.kl_coef:
            kl_BT = (batch["sampler_logps"] - batch["reference_logps"]) * mask_BT
            rewards_BT = rewards_BT - rl.kl_coef * kl_BT
            self.note(reference_kl=float(kl_BT.sum() / mask_BT.sum()))
        values_BT = self.scorer.no_grad(self.model, batch, self._values)
        settings = self.config.critic
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=settings.gamma, lam=settings.lam)
        batch |= {"values": values_BT, "returns": returns_BT}
        self.note(value=float(values_BT.sum() / mask_BT.sum()))
        self.note(explained_variance=explained_variance(values_BT, returns_BT, mask_BT))
        return whitened(advantages_BT, mask_BT * batch["tool_mask"])

    def further_loss(
        self, inputs: Batch, scores: TokenScores, target_logps_MT: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The value loss, times `critic.coef`, beside what SidTrainer adds."""
        values_BT = self._values(inputs, scores)
        settings = self.config.critic
        loss = value_loss(values_BT, inputs["values"], inputs["returns"], inputs["completion_mask"], settings.clip)
        self.note(value_loss=float(loss.detach()))
        others = super().further_loss(inputs, scores, target_logps_MT)
        return settings.coef * loss + (0.0 if others is None else others)

    def save_more(self, folder: Path) -> None:
        """The critic too; its optimizer state is in TRL's file."""
        super().save_more(folder)
        self.critic.save(folder)

    def load_more(self, folder: Path) -> None:
        """The counterpart of `save_more`."""
        super().load_more(folder)
        self.critic.load(folder)

    def _values(self, batch: Batch, scores: TokenScores) -> torch.Tensor:
        return self.critic.values(batch, scores, self.num_generations if self.config.rl.packing else None)
