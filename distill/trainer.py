"""Any trainer of `rl`, with steps or shares of distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from configs.schema import RunConfig
from distill.distiller import PREFIX, Distiller
from distill.scoring import TextLoss
from rl.batch import Batch
from rl.scoring import TokenScores
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

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        settings, step = self.config.distill, self.state.global_step
        alone = settings.every > 0 and (step + 1) % settings.every == 0
        if not alone and not settings.weight:
            return super()._generate_and_score_completions(inputs)
        self.sync_weights()
        with self.phase("texts"):
            written = self.distiller.write(self.fleet, step, self.draw_seed(step, 1_008))
        batch: Batch = {} if alone else super()._generate_and_score_completions(inputs)  # while teachers score
        with self.phase("texts"):
            return batch | self.distiller.batch(written)

    def _compute_loss(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        if "completion_ids" in inputs:
            return super()._compute_loss(model, inputs)
        with self.phase("update"):
            return self._text_loss(model, inputs).loss

    def further_loss(
        self, inputs: Batch, scores: TokenScores, target_logps_MT: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`distill.weight` times the texts' loss, beside what else is added."""
        others = super().further_loss(inputs, scores, target_logps_MT)
        if f"{PREFIX}ids" not in inputs:
            return others
        share = (
            self.current_gradient_accumulation_steps
        )  # what is returned here is divided by it; this is a share already
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
