"""Packed groups: a prompt and its G completions as one row, the prompt computed once.

TRL scores one row per completion, G·(P + T) tokens a group. Here a group is one row of P + G·(T - 1) tokens under a
tree attention mask: a completion's token sees the prompt and its own completion only, and counts its position from the
end of the prompt. Keys, values and gradients are those of the unpacked rows: the two ways agree up to float rounding.

Axes: M groups, G completions of a group, P prompt positions (left padded), T completion tokens, S = P + G·(T - 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from rollout.support import additive_mask


@dataclass(frozen=True)
class PackedGroups:
    """Model inputs of M packed groups, and where the logits of each completion token are found.

    Attributes:
        ids_MS: tokens. The last token of a completion predicts nothing and is left out.
        mask_M1SS: additive attention mask, 0 where seen; for FlexAttention its block mask, which skips what is empty.
        positions_MS: position of each token in its own completion's sequence.
        keep: positions [1 + G·(T - 1)] whose logits are needed: the prompt's last one, then the completions'.
        place_GT: for each completion token, its index into the kept logits.
    """

    ids_MS: torch.Tensor
    mask_M1SS: torch.Tensor | BlockMask
    positions_MS: torch.Tensor
    keep: torch.Tensor
    place_GT: torch.Tensor


def pack_groups(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion: int,
    group: int,
    dtype: torch.dtype,
    *,
    blocks: bool = False,
) -> PackedGroups:
    """Pack rows [M·G, P + T] whose groups stand whole and in order.

    Args:
        input_ids: left-padded prompts followed by right-padded completions.
        attention_mask: 1 on real tokens.
        completion: T.
        group: G.
        dtype: type of the additive mask, the model's.
        blocks: make FlexAttention's block mask instead.

    Raises:
        ValueError: when the rows are no whole groups.
    """
    rows, prompt = input_ids.shape[0], input_ids.shape[1] - completion
    if rows % group:
        raise ValueError(f"{rows} rows are no whole groups of {group}")
    device, groups, kept = input_ids.device, rows // group, completion - 1
    ids_MGS = input_ids.view(groups, group, -1)
    if not torch.equal(ids_MGS[:, :1, :prompt].expand(-1, group, -1), ids_MGS[:, :, :prompt]):
        raise ValueError("rows of one group have different prompts; groups must be whole and in order")
    prompt_mask_MP = attention_mask.view(groups, group, -1)[:, 0, :prompt].bool()
    branches_MB = ids_MGS[:, :, prompt : prompt + kept].reshape(groups, -1)
    ids_MS = torch.cat([ids_MGS[:, 0, :prompt], branches_MB], dim=1)

    branch = torch.arange(group, device=device).repeat_interleave(kept)
    step = torch.arange(kept, device=device).repeat(group)
    size = prompt + len(branch)
    mask = _block_mask(prompt_mask_MP, branch) if blocks else _additive_mask(prompt_mask_MP, branch, step, dtype)

    prompt_positions_MP = (prompt_mask_MP.long().cumsum(dim=1) - 1).clamp(min=0)
    positions_MS = torch.cat([prompt_positions_MP, prompt_mask_MP.sum(dim=1, keepdim=True) + step[None]], dim=1)
    keep = torch.arange(prompt - 1, size, device=device)
    first = torch.zeros((group, 1), dtype=torch.long, device=device)
    place_GT = torch.cat([first, 1 + torch.arange(group * kept, device=device).view(group, kept)], dim=1)
    return PackedGroups(ids_MS, mask, positions_MS, keep, place_GT)


def _additive_mask(
    prompt_mask_MP: torch.Tensor, branch: torch.Tensor, step: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The tree mask [M, 1, S, S] as numbers to add."""
    (groups, prompt), device = prompt_mask_MP.shape, branch.device
    size, own_BB = prompt + len(branch), (branch[:, None] == branch[None]) & (step[:, None] >= step[None])
    seen_MSS = torch.zeros((groups, size, size), dtype=torch.bool, device=device)
    causal_PP = torch.ones((prompt, prompt), dtype=torch.bool, device=device).tril()
    seen_MSS[:, :prompt, :prompt] = causal_PP & prompt_mask_MP[:, None]
    seen_MSS[:, prompt:, :prompt] = prompt_mask_MP[:, None]
    seen_MSS[:, prompt:, prompt:] = own_BB
    # A padded position sees itself, so that no row of the softmax is empty.
    seen_MSS |= torch.eye(size, dtype=torch.bool, device=device)
    return additive_mask(seen_MSS, dtype)[:, None]


def _block_mask(prompt_mask_MP: torch.Tensor, branch: torch.Tensor) -> BlockMask:
    """The same tree mask as a rule: what FlexAttention computes, block by block where anything is seen."""
    (groups, prompt), device = prompt_mask_MP.shape, branch.device
    written = torch.ones((groups, len(branch)), dtype=torch.bool, device=device)
    there_MS = torch.cat([prompt_mask_MP, written], dim=1)
    branch_S = torch.cat([torch.full((prompt,), -1, device=device), branch])

    def seen(m: torch.Tensor, _: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        mine = (branch_S[k] == -1) | (branch_S[k] == branch_S[q])
        return (there_MS[m, k] & mine & (k <= q)) | (k == q)

    size = prompt + len(branch)
    return create_block_mask(seen, groups, None, size, size, device=device)
