"""The order in which prompts are taken."""

from __future__ import annotations

from trl.trainer.utils import RepeatSampler


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order of its own for each pass over the rows, so that a resumed pass has the same one."""

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers' loop before each pass."""
        if self.shuffle:
            self.generator.manual_seed(self.seed + 1_000_003 * epoch)
