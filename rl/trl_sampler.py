"""The order in which prompts are taken."""

from __future__ import annotations

import torch
from trl.trainer.utils import RepeatSampler


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order of its own for each pass over the rows, so that a resumed pass has the same one."""

    def batch(self, number: int) -> list[int]:
        """The rows of a batch of prompts, counted over all passes: what the loop will take, known beforehand."""
        epoch, place = divmod(number, self.num_samples // self.batch_size)
        order = list(range(self.num_samples))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers' loop before each pass."""
        if self.shuffle:
            self.generator.manual_seed(self.seed + 1_000_003 * epoch)
