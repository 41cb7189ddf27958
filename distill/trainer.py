"""Any trainer of `rl`, with steps or shares of distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from configs.schema import RunConfig
from distill.distiller import PREFIX, Distiller
from distill.scoring import TextLoss
from rl.batch import Batch
from rl.scoring import TokenScores
from rl.trailing import Reference
from rl.trainers import trainer_class
from rl.trl_trainer import SidTrainer

if TYPE_CHECKING:
    _Base = SidTrainer
else:
    _Base = object


class Distilling(_Base):
    """What a trainer gains: texts in its batches, and their loss."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.distiller = Distiller(self.config, self.task, self.policy, self.accelerator.device)
        self.start = Reference(self.policy, every=0, mixup=0) if self.config.distill.recommendation else None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        settings, step = self.config.distill, self.state.global_step
        alone = settings.every > 0 and (step + 1) % settings.every == 0
        if not alone and not settings.weight:
            return super()._generate_and_score_completions(inputs)
        self.sync_weights()
        with self.phase("texts"):
            written = self.distiller.write(self.fleet, step, self.draw_seed(step, 1_008))
        # Teachers in processes of their own score meanwhile.
        batch = self.recommended(inputs) if alone else super()._generate_and_score_completions(inputs)
        with self.phase("texts"):
            return batch | self.distiller.batch(written)

    def recommended(self, inputs: list[dict[str, Any]]) -> Batch:
        """Rollouts of recommendation prompts and what the start says of them, if `distill.recommendation` asks."""
        if self.start is None:
            return {}
        batch = self.scorer.batch([group for drawn in self.generate(self.samples_of(inputs)) for group in drawn])
        with self.phase("reference"), self.start.shown():
            return batch | {"start_logps": self.scorer.logps(self.model, batch)}

    def _compute_loss(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        if "advantages" in inputs:
            return super()._compute_loss(model, inputs)
        with self.phase("update"):
            loss = self._text_loss(model, inputs).loss
            return loss + self.config.distill.recommendation * self.held_loss(model, inputs) if self.start else loss

    def held_loss(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        """The share of a micro-batch in the mean of r - log r - 1 with r = start / policy, over the batch's tokens.

        The k3 estimator of the reverse KL (Schulman, 2020). On the policy's own draws its gradient is that of the
        forward KL, which covers all that the start would recommend: what keeps a list whole.
        """
        gap_BT = inputs["start_logps"] - self.scorer.scores(model, inputs).logps_BT
        counted_BT = inputs["completion_mask"] * inputs["tool_mask"]
        loss = ((gap_BT.exp() - gap_BT - 1) * counted_BT).sum() / inputs["num_items_in_batch"]
        self.note(**{"distill/recommendation": float(loss.detach()) * self.args.gradient_accumulation_steps})
        return loss

    def further_loss(
        self, inputs: Batch, scores: TokenScores, target_logps_MT: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`distill.weight` times the texts' loss, beside what else is added."""
        others = super().further_loss(inputs, scores, target_logps_MT)
        if f"{PREFIX}ids" not in inputs:
            return others
        share = self.current_gradient_accumulation_steps  # the caller divides by it, and this is a share already
        mine = self.config.distill.weight * share * self._text_loss(self.model, inputs).loss
        return mine if others is None else mine + others

    def _text_loss(self, model: torch.nn.Module, inputs: Batch) -> TextLoss:
        found = self.distiller.loss(model, inputs, self.accelerator.device)
        self.note(
            **{
                "distill/divergence": found.divergence,
                "distill/tokens": float(found.tokens),
                "distill/item_tokens": found.item_tokens,
            }
        )
        return found


def distilling(config: RunConfig) -> type[SidTrainer]:
    """The trainer of `algo`, with distillation."""
    base = trainer_class(config)
    return type(f"Distilling{base.__name__}", (Distilling, base), {})
