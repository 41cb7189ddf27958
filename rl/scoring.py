"""Log-probabilities of completion tokens under a policy, on the support that they were drawn from.

The trunk runs once over packed groups (or a row per completion), and the output layer only where a token is predicted.

Axes: B rows, P prompt positions (left padded), T completion tokens, D hidden size, V vocabulary, N predicted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel

from rl.packing import pack_groups
from rollout.support import WHOLE_VOCABULARY, TorchTrie


@dataclass(frozen=True)
class TokenScores:
    """What a policy says of each completion token; zeros where a row has no token.

    Attributes:
        logps_BT: log-probability of the token on its support, float32.
        entropies_BT: entropy of that support, float32.
        hidden_BTD: the trunk's last hidden state at the position that predicts the token (what a value head reads).
    """

    logps_BT: torch.Tensor
    entropies_BT: torch.Tensor
    hidden_BTD: torch.Tensor


def support_nodes(trie: TorchTrie, tokens_BT: torch.Tensor, on_trie_BT: torch.Tensor) -> torch.Tensor:
    """The trie node each token was drawn at, `WHOLE_VOCABULARY` for tokens of free text.

    An item starts at the root: at the first token on the trie after free text, and after each whole item.

    Raises:
        ValueError: when a token on the trie continues no path.
    """
    depth, leaves = trie.trie.depth, int(trie.level_start[-2])
    nodes_BT = torch.full_like(tokens_BT, WHOLE_VOCABULARY)
    at_B = torch.zeros_like(tokens_BT[:, 0])
    for step in range(tokens_BT.shape[1]):
        on_B = on_trie_BT[:, step]
        nodes_BT[:, step] = torch.where(on_B, at_B, WHOLE_VOCABULARY)
        next_B = trie.find(at_B, tokens_BT[:, step])
        if bool((on_B & (next_B < 0)).any()):
            row = int((on_B & (next_B < 0)).nonzero()[0])
            raise ValueError(
                f"row {row}, token {step}: {int(tokens_BT[row, step])} does not follow node {int(at_B[row])} of the "
                f"trie ({depth} levels)"
            )
        at_B = torch.where(on_B & (next_B < leaves), next_B, 0)
    return nodes_BT


def score_tokens(
    model: torch.nn.Module,
    trie: TorchTrie,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    nodes_BT: torch.Tensor,
    *,
    group: int | None,
    temperature: float = 1.0,
) -> TokenScores:
    """Score the last T tokens of each row.

    Args:
        model: a causal language model, with or without a LoRA adapter.
        trie: the supports.
        input_ids: left-padded prompts followed by right-padded completions [B, P + T].
        attention_mask: 1 on real tokens.
        nodes_BT: where each completion token was drawn: a node of the trie, or `WHOLE_VOCABULARY`.
        group: rows of a group, to compute its prompt once; None computes each row by itself.
        temperature: logits are divided by it.
    """
    length = nodes_BT.shape[1]
    trunk, head = _parts(model)
    if group is None:
        hidden_BTD = trunk(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state[:, -length - 1 : -1]
    else:
        packed = pack_groups(input_ids, attention_mask, length, group, trunk.dtype)
        states_MSD = trunk(
            input_ids=packed.ids_MS,
            attention_mask=packed.mask_M1SS,
            position_ids=packed.positions_MS,
            use_cache=False,
        ).last_hidden_state
        hidden_BTD = states_MSD[:, packed.keep[packed.place_GT]].flatten(0, 1)
    written_BT = attention_mask[:, -length:].bool()
    tokens_BT = input_ids[:, -length:]
    logits_NV = head(hidden_BTD[written_BT]) / temperature
    logps_N, entropies_N = trie.token_logps(logits_NV, nodes_BT[written_BT], tokens_BT[written_BT])
    blank_BT = torch.zeros(tokens_BT.shape, device=logps_N.device)
    return TokenScores(
        blank_BT.masked_scatter(written_BT, logps_N), blank_BT.masked_scatter(written_BT, entropies_N), hidden_BTD
    )


def _parts(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Trunk and output layer of a causal language model; the layers of an active adapter are inside them."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(inner, inner.base_model_prefix), inner.get_output_embeddings()
