"""Groups of rollouts as the tensors of the loss: rows of a group stay together and in order.

Axes: M groups, G rollouts of a group, B = M·G rows, P prompt positions, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rl.scoring import support_nodes
from rollout.support import WHOLE_VOCABULARY, TorchTrie
from rollout.types import RolloutGroup

Batch = dict[str, torch.Tensor]


def make_batch(groups: Sequence[RolloutGroup], trie: TorchTrie, pad: int, *, on_trie: bool) -> Batch:
    """Tensors of whole groups of equal size.

    Args:
        groups: what was drawn.
        trie: the trie they were drawn under.
        pad: token that fills up short rows.
        on_trie: False scores every token on the whole vocabulary, whatever it was drawn from.

    Returns:
        `prompt_ids` and `prompt_mask` [B, P] (left padded), `completion_ids` and `completion_mask` [B, T],
        `sampler_logps` [B, T], `nodes` [B, T] (see `support_nodes`) and `num_items_in_batch`, TRL's count of tokens.
    """
    device = trie.token_of.device
    prompts = [group.sample.prompt_ids for group in groups for _ in group.rollouts]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    batch = {
        "prompt_ids": pad_rows(prompts, pad, left=True),
        "prompt_mask": pad_rows([[1] * len(prompt) for prompt in prompts], 0, left=True),
        "completion_ids": pad_rows([rollout.token_ids for rollout in rollouts], pad),
        "completion_mask": pad_rows([[1] * len(rollout.token_ids) for rollout in rollouts], 0),
        "sampler_logps": pad_rows([rollout.logps_sampler for rollout in rollouts], 0.0),
    }
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    drawn_BT = pad_rows([rollout.on_trie for rollout in rollouts], False).to(device)
    if on_trie:
        batch["nodes"] = support_nodes(trie, batch["completion_ids"], drawn_BT)
    else:
        batch["nodes"] = torch.full_like(batch["completion_ids"], WHOLE_VOCABULARY)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    return batch


def slices_of(batch: Batch, count: int) -> list[Batch]:
    """`count` equal parts of a batch, each tensor cut along its rows; scalars stand in every part."""
    cut = {name: tensor.chunk(count) if tensor.dim() else (tensor,) * count for name, tensor in batch.items()}
    return [{name: parts[index] for name, parts in cut.items()} for index in range(count)]


def with_targets(batch: Batch, group: int) -> Batch:
    """The rows to score when a batch brings `target_ids` [M, T]: each group's target as one more row at its end."""

    def joined(rows: torch.Tensor, last_M: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows.view(-1, group, rows.shape[1]), last_M[:, None]], dim=1).flatten(0, 1)

    return {
        "prompt_ids": joined(batch["prompt_ids"], batch["prompt_ids"][::group]),
        "prompt_mask": joined(batch["prompt_mask"], batch["prompt_mask"][::group]),
        "completion_ids": joined(batch["completion_ids"], batch["target_ids"]),
        "completion_mask": joined(batch["completion_mask"], batch["target_mask"]),
        "nodes": joined(batch["nodes"], batch["target_nodes"]),
    }


def pad_rows(rows: Sequence[Sequence[float]], value: float, left: bool = False) -> torch.Tensor:
    """Rows of unequal length as one tensor, filled up with `value`."""
    longest = max(map(len, rows))
    return torch.tensor(
        [
            [value] * (longest - len(row)) + list(row) if left else list(row) + [value] * (longest - len(row))
            for row in rows
        ]
    )
