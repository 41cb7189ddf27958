"""The reference policy that `rl.kl_coef` holds the policy to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

FILE = "reference.safetensors"


class Reference:
    """The policy as it was at the start, or as it slowly follows (`rl.sync_ref_every`; TR-DPO, arXiv 2404.09656).

    Under LoRA it is the policy's own base without the adapter, or with a second small set of adapter weights once it
    follows: the base is never copied. Without LoRA it is a second model.

    Args:
        policy: the policy, with its adapter if it has one.
        copy: a second model that starts as the policy does; None under LoRA.
        every: the reference follows every so many steps; 0 keeps it as it is.
        mixup: share of the policy when it follows, reference ← (1 - mixup) · reference + mixup · policy.
    """

    def __init__(self, policy: nn.Module, copy: nn.Module | None, *, every: int, mixup: float) -> None:
        if copy is None and not isinstance(policy, PeftModel):
            raise ValueError("a policy without an adapter needs a second model as its reference")
        self.policy, self.copy, self.every, self.mixup = policy, copy, every, mixup
        self.weights: dict[str, torch.Tensor] = {}
        if every:
            source = self._trained() if copy is None else dict(copy.named_parameters())
            self.weights = {k: v.detach().clone() if copy is None else v.data for k, v in source.items()}

    @contextmanager
    def shown(self) -> Iterator[nn.Module]:
        """The reference as a model, for a block."""
        if self.copy is not None:
            yield self.copy
        elif not self.weights:
            with self.policy.disable_adapter():  # type: ignore[operator]
                yield self.policy
        else:
            self._swap()
            try:
                yield self.policy
            finally:
                self._swap()

    def follow(self, step: int) -> None:
        """Move towards the policy if this is a step to do so."""
        if not self.every or step % self.every:
            return
        now = self._trained() if self.copy is None else dict(self.policy.named_parameters())
        for name, weight in self.weights.items():
            weight.lerp_(now[name].detach(), self.mixup)

    def save(self, folder: Path) -> None:
        """Keep a reference that follows with a checkpoint; one that does not is known from the start."""
        if self.weights:
            save_file({name: weight.contiguous() for name, weight in self.weights.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take the reference of a checkpoint up again.

        Raises:
            ValueError: when the checkpoint holds none and this reference follows the policy.
        """
        if not self.weights:
            return
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder} holds no {FILE}: it was written without rl.sync_ref_every; start a new run")
        for name, weight in load_file(folder / FILE).items():
            self.weights[name].copy_(weight)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.policy.named_parameters() if weight.requires_grad}

    def _swap(self) -> None:
        for name, weight in self._trained().items():
            weight.data, self.weights[name] = self.weights[name], weight.data
