"""Groups of rollouts as the tensors of the loss, and what a model says of them.

Rows of a group stay together and in order.

Axes: M groups, G rollouts of a group, B = M·G rows, P prompt positions, T completion tokens, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from configs.schema import RunConfig
from rl.scoring import FORCED, TokenScores, score_tokens, support_places
from rl.task import Task
from rollout.support import TEXT, TorchTrie
from rollout.types import Rollout, RolloutGroup
from rollout.views import Views

Batch = dict[str, Any]
"""Tensors by name, cut along their rows into micro-batches; `views` (of the trie) stays whole."""

SCORED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "places")
"""What scoring reads of a batch."""


class BatchScorer:
    """Makes batches of groups and scores them on the support that `rl.support` names.

    Args:
        task: trie, catalogue and tokenizer.
        config: the run's settings.
        trie: the task's trie on the device of the policy.
        autocast: the precision context of the trainer.
    """

    def __init__(
        self, task: Task, config: RunConfig, trie: TorchTrie, autocast: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.task, self.config, self.trie, self.autocast = task, config, trie, autocast
        self.device, self.group = trie.device, config.rollout.group_size

    def batch(self, groups: Sequence[RolloutGroup]) -> Batch:
        """Tensors of whole groups of equal size.

        Returns:
            `prompt_ids` and `prompt_mask` [B, P] (left padded), `completion_ids` and `completion_mask` [B, T],
            `tool_mask` [B, T] (TRL's name: 0 on tokens without gradient), `sampler_logps` [B, T],
            `places` [B, T] (see `support_places`) in `views` of the trie (None where nothing is restricted), `roots`
            [B] of the first items in them, and `num_items_in_batch`, TRL's count of tokens.
        """
        prompts = [group.sample.prompt_ids for group in groups for _ in group.rollouts]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        pad = self.task.tokenizer.pad_token_id
        forced = [rollout.forced or (False,) * len(rollout.token_ids) for rollout in rollouts]
        rows = {
            "prompt_ids": pad_rows(prompts, pad, left=True),
            "prompt_mask": pad_rows([[1] * len(prompt) for prompt in prompts], 0, left=True),
            "completion_ids": pad_rows([rollout.token_ids for rollout in rollouts], pad),
            "completion_mask": pad_rows([[1] * len(rollout.token_ids) for rollout in rollouts], 0),
            "tool_mask": pad_rows([[int(flag) for flag in row] for row in self._counted(rollouts)], 1),
            "sampler_logps": pad_rows([rollout.logps_sampler for rollout in rollouts], 0.0),
        }
        batch: Batch = {name: tensor.to(self.device) for name, tensor in rows.items()}
        views, roots_BK = self._views(groups)
        on_trie_BT = pad_rows([rollout.on_trie for rollout in rollouts], False).to(self.device)
        places_BT = self._places(views, roots_BK, batch["completion_ids"], on_trie_BT)
        if self.trie.banned:
            places_BT = places_BT.masked_fill(~on_trie_BT, TEXT)
        places_BT = places_BT.masked_fill(pad_rows(forced, False).to(self.device), FORCED)
        batch |= {"views": views, "roots": roots_BK[:, 0], "places": places_BT}
        batch["num_items_in_batch"] = (batch["completion_mask"] * batch["tool_mask"]).sum()
        return batch

    def targets(self, batch: Batch, items: Sequence[int]) -> Batch:
        """One target item a group as a row of the loss [M, T], drawn from what the group's first item could be."""
        length = batch["completion_ids"].shape[1]
        paths_ML = torch.from_numpy(self.task.decoder.paths_of_items(items))
        written_MT, ids_MT = (
            torch.nn.functional.pad(rows, (0, length - paths_ML.shape[1])).to(self.device)
            for rows in (torch.ones_like(paths_ML), paths_ML)
        )
        roots_M1 = batch["roots"][:: self.group, None]
        places_MT = self._places(batch["views"], roots_M1, ids_MT, written_MT.bool())
        return {"target_ids": ids_MT, "target_mask": written_MT, "target_places": places_MT}

    def scores(self, model: torch.nn.Module, batch: Batch, group: int | None = None) -> TokenScores:
        """Log-probabilities and entropies of the completions; groups of `group` rows, by default G."""
        with self.autocast():
            return score_tokens(
                model,
                self.trie.under(batch["views"]),
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["places"],
                group=(group or self.group) if self.config.rl.packing else None,
                temperature=self.config.rollout.temperature,
            )

    def scores_and_targets(self, model: torch.nn.Module, batch: Batch) -> tuple[TokenScores, torch.Tensor | None]:
        """Scores of the rollouts, and log-probabilities [M, T] of the targets if the batch brings some.

        A target is one more branch of its group: it costs its own tokens, and its prompt nothing.
        """
        if "target_ids" not in batch:
            return self.scores(model, batch), None
        both = self.scores(model, _with_targets(batch, self.group), self.group + 1)

        def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            by_group = values.view(-1, self.group + 1, *values.shape[1:])
            return by_group[:, :-1].flatten(0, 1), by_group[:, -1]

        logps_BT, target_logps_MT = split(both.logps_BT)
        return TokenScores(logps_BT, split(both.entropies_BT)[0], split(both.hidden_BTD)[0]), target_logps_MT

    def logps(self, model: torch.nn.Module, batch: Batch, group: int | None = None) -> torch.Tensor:
        """Log-probabilities [B, T] without gradients."""
        return self.no_grad(model, batch, lambda _, scores: scores.logps_BT, group)

    @torch.no_grad()
    def no_grad(
        self,
        model: torch.nn.Module,
        batch: Batch,
        read: Callable[[Batch, TokenScores], torch.Tensor],
        group: int | None = None,
    ) -> torch.Tensor:
        """What `read` makes of a batch and its scores, a micro-batch at a time, without gradients and dropout."""
        size = self.config.rl.micro_batch_groups * (group or self.group)
        parts = [
            {**dict(zip(SCORED, part, strict=True)), "views": batch["views"]}
            for part in zip(*(batch[n].split(size) for n in SCORED), strict=True)
        ]
        with evaluating(model):
            return torch.cat([read(part, self.scores(model, part, group)) for part in parts])

    def _views(self, groups: Sequence[RolloutGroup]) -> tuple[Views | None, torch.Tensor]:
        """Views of the trie that the items of rollouts were drawn from, and their roots [B, K].

        The first item of a rollout is drawn from what its sample may recommend, each further one from what is left.
        """
        decoder, device = self.task.decoder, self.device
        views = decoder.views([group.sample for group in groups])
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        longest = max(1, *(len(rollout.sids) for rollout in rollouts))
        if views is None and longest == 1:
            return None, torch.zeros((len(rollouts), 1), dtype=torch.long, device=device)
        seen = np.arange(1, len(groups) + 1) if views else np.zeros(len(groups), dtype=np.int64)
        view_B = np.repeat(seen, [len(group) for group in groups])
        taken_BKK = np.full((len(rollouts), longest, longest - 1), -1)  # the leaves that are gone before each item
        for row, rollout in enumerate(rollouts):
            leaves = decoder.trie.leaves(rollout.sids)
            for item in range(1, len(leaves)):
                taken_BKK[row, item, :item] = leaves[:item]
        every = (views or Views.build(decoder.trie, [])).without(
            view_B.repeat(longest), taken_BKK.reshape(len(view_B) * longest, longest - 1)
        )
        return every, torch.from_numpy(every.roots_V[1:]).view(len(rollouts), longest).to(device)

    def _counted(self, rollouts: Sequence[Rollout]) -> list[list[bool]]:
        """Which tokens have a gradient: those that were drawn, of rollouts that are not masked."""
        mask = self.config.thought.unfinished == "mask"
        return [
            [
                not flag and not (mask and rollout.truncated)
                for flag in rollout.forced or (False,) * len(rollout.token_ids)
            ]
            for rollout in rollouts
        ]

    def _places(
        self, views: Views | None, roots_BK: torch.Tensor, tokens_BT: torch.Tensor, on_trie_BT: torch.Tensor
    ) -> torch.Tensor:
        on_trie_BT = on_trie_BT & (self.config.rl.support == "trie")
        return support_places(self.trie.under(views), tokens_BT, on_trie_BT, roots_BK)


def slices_of(batch: Batch, count: int) -> list[Batch]:
    """`count` equal parts of a batch, each tensor cut along its rows; scalars and views stand in every part."""
    cut = {
        name: value.chunk(count) if isinstance(value, torch.Tensor) and value.dim() else (value,) * count
        for name, value in batch.items()
    }
    return [{name: parts[index] for name, parts in cut.items()} for index in range(count)]


def _with_targets(batch: Batch, group: int) -> Batch:
    """The rows to score when a batch brings `target_ids` [M, T]: each group's target as one more row at its end."""

    def joined(rows: torch.Tensor, last_M: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows.view(-1, group, rows.shape[1]), last_M[:, None]], dim=1).flatten(0, 1)

    return {
        "prompt_ids": joined(batch["prompt_ids"], batch["prompt_ids"][::group]),
        "prompt_mask": joined(batch["prompt_mask"], batch["prompt_mask"][::group]),
        "completion_ids": joined(batch["completion_ids"], batch["target_ids"]),
        "completion_mask": joined(batch["completion_mask"], batch["target_mask"]),
        "places": joined(batch["places"], batch["target_places"]),
        "views": batch["views"],
    }


def prompted_rows(
    prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], pad: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Left-padded prompts followed by right-padded texts [B, P + T], the mask of real tokens, and T."""
    ids = [pad_rows(prompts, pad, left=True), pad_rows(texts, pad)]
    masks = [
        pad_rows([[1] * len(prompt) for prompt in prompts], 0, left=True),
        pad_rows([[1] * len(text) for text in texts], 0),
    ]
    return torch.cat(ids, dim=1), torch.cat(masks, dim=1), ids[1].shape[1]


def pad_rows(rows: Sequence[Sequence[float]], value: float, left: bool = False) -> torch.Tensor:
    """Rows of unequal length as one tensor, filled up with `value`."""
    longest = max(map(len, rows))
    return torch.tensor(
        [
            [value] * (longest - len(row)) + list(row) if left else list(row) + [value] * (longest - len(row))
            for row in rows
        ]
    )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode for a block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
