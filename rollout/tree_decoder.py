"""Decoding on a Hugging Face model: each prompt is computed once, then a tree of branches grows from it.

Branches share the prompt's keys and values; a 4-D attention mask lets each new token see its prompt and its own
ancestors only, so nothing is copied or reordered when branches split.

Axes: B prompts, P padded prompt length, W branches per prompt, S branch tokens so far, D hidden size, V vocabulary,
C children, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from rollout.output_layer import OutputLayer, trunk_of
from rollout.support import TorchTrie, additive_mask


class TreeDecoder:
    """Keys and values of a batch of prompts and of the branches that grew from them."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.trunk, self.head = model, trunk_of(model), OutputLayer(model)
        self.vocab_size = model.config.get_text_config().vocab_size
        device = model.device
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros((len(prompts), longest), dtype=torch.long)
        mask = torch.zeros((len(prompts), longest), dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = True
        self.prompt_ids_BP, self.prompt_mask_BP = ids.to(device), mask.to(device)
        self.lengths_B = self.prompt_mask_BP.sum(dim=1)
        self.cache = DynamicCache()
        self.ancestors_BWS = torch.zeros((len(prompts), 1, 0), dtype=torch.bool, device=device)
        self.depth = 0
        self.started = False

    def prefill(self) -> torch.Tensor:
        """Compute the prompts; returns the hidden states [B, D] after each."""
        self.started = True
        positions = (self.prompt_mask_BP.cumsum(dim=1) - 1).clamp(min=0)
        return self._forward(self.prompt_ids_BP, self.prompt_mask_BP.long(), positions)[:, -1]

    def extend(self, tokens_BW: torch.Tensor, parents_BW: torch.Tensor) -> torch.Tensor:
        """Append one token to branches.

        Args:
            tokens_BW: the new tokens.
            parents_BW: which branch of the last call each continues (zeros on the first call).

        Returns:
            hidden states [B, W, D] after each.
        """
        batch, width = tokens_BW.shape
        inherited = self.ancestors_BWS.gather(1, parents_BW[:, :, None].expand(-1, -1, self.ancestors_BWS.shape[2]))
        itself = torch.eye(width, dtype=torch.bool, device=tokens_BW.device).expand(batch, -1, -1)
        self.ancestors_BWS = torch.cat([inherited, itself], dim=2)
        seen = torch.cat([self.prompt_mask_BP[:, None].expand(-1, width, -1), self.ancestors_BWS], dim=2)
        mask = additive_mask(seen, self.model.dtype)
        positions = (self.lengths_B[:, None] + self.depth).expand(-1, width)
        self.depth += 1
        return self._forward(tokens_BW, mask[:, None], positions)

    def child_logps(
        self, trie: TorchTrie, level: int, hidden_ND: torch.Tensor, places_N: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the children of places of one level; only that level's logits are computed."""
        first, stop = trie.token_range(level)
        logits_NV = self.head.logits(hidden_ND, first, stop).float()
        return trie.child_logps(logits_NV, places_N, temperature=temperature, first_token=first)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of the whole vocabulary."""
        return self.head.logits(hidden_ND, 0, self.vocab_size).float()

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self.trunk(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden
