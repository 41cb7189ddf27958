"""Weights that trail the policy's: the reference of the KL term, and the running average that a run may keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn


class TrailingWeights:
    """A copy of a model's trained weights that follows them: copy ← (1 - share) · copy + share · trained.

    Under LoRA the copy is as small as the adapter.

    Args:
        model: the policy.
        share: share of the trained weights each time the copy follows.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.model, self.share = model, share
        self.weights = {name: weight.detach().clone() for name, weight in self._trained().items()}

    def follow(self) -> None:
        """Move towards the trained weights."""
        for name, weight in self._trained().items():
            self.weights[name].lerp_(weight.detach(), self.share)

    def swap(self) -> None:
        """Exchange the copy and the model's weights."""
        for name, weight in self._trained().items():
            weight.data, self.weights[name] = self.weights[name], weight.data

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The copy in the model's place, for a block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def save(self, file: Path) -> None:
        """Write the copy."""
        save_file({name: weight.contiguous() for name, weight in self.weights.items()}, file)

    def load(self, file: Path, setting: str) -> None:
        """Take a copy up again.

        Raises:
            ValueError: when the checkpoint was written without it; `setting` is what asks for it.
        """
        if not file.is_file():
            raise ValueError(f"{file.parent} holds no {file.name}: it was written without {setting}; start a new run")
        for name, weight in load_file(file).items():
            self.weights[name].copy_(weight)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}


class Reference:
    """The policy that `rl.kl_coef` holds the policy to: as it was at the start, or following it slowly.

    Under LoRA it is the policy's own base with the adapter switched off, or with a second adapter's weights once it
    follows (TR-DPO, arXiv 2404.09656): the base never stands in memory twice. Without LoRA it is a copy of the weights.

    Args:
        policy: the policy, with its adapter if it has one.
        every: it follows every so many steps; 0 keeps it.
        mixup: share of the policy when it follows.
    """

    def __init__(self, policy: nn.Module, *, every: int, mixup: float) -> None:
        self.policy, self.every = policy, every
        self.trailing = TrailingWeights(policy, mixup) if every or not isinstance(policy, PeftModel) else None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The reference in the policy's place, for a block."""
        with self.trailing.shown() if self.trailing else self.policy.disable_adapter():  # type: ignore[operator]
            yield

    def after_step(self, step: int) -> None:
        """Follow if this is a step to do so."""
        if self.trailing and self.every and step % self.every == 0:
            self.trailing.follow()

    def save(self, folder: Path) -> None:
        """Keep a reference that follows with a checkpoint; one that does not is known from the start."""
        if self.trailing and self.every:
            self.trailing.save(folder / "reference.safetensors")

    def load(self, folder: Path) -> None:
        """Take the reference of a checkpoint up again. Raises ValueError when it holds none."""
        if self.trailing and self.every:
            self.trailing.load(folder / "reference.safetensors", "rl.sync_ref_every")
