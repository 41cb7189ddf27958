"""Search under the trie on a Hugging Face model: each prompt is computed once, then a tree of branches grows from it.

Branches share the prompt's keys and values; a 4-D attention mask lets each new token see its prompt and its own
ancestors only, so nothing is copied or reordered when branches split.

Axes: B prompts, P padded prompt length, W branches per prompt, S branch tokens so far, L levels, V vocabulary,
C children.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from rollout.support import TorchTrie, additive_mask
from rollout.types import Sample, Sampling


class TreeDecoder:
    """Keys and values of a batch of prompts and of the branches that grew from them."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
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

    def prefill(self) -> torch.Tensor:
        """Compute the prompts; returns the logits [B, V] of the token after each."""
        positions = (self.prompt_mask_BP.cumsum(dim=1) - 1).clamp(min=0)
        return self._forward(self.prompt_ids_BP, self.prompt_mask_BP.long(), positions)[:, -1]

    def extend(self, tokens_BW: torch.Tensor, parents_BW: torch.Tensor) -> torch.Tensor:
        """Append one token to branches.

        Args:
            tokens_BW: the new tokens.
            parents_BW: which branch of the last call each continues (zeros on the first call).

        Returns:
            logits [B, W, V] of the token after each.
        """
        batch, width = tokens_BW.shape
        inherited = self.ancestors_BWS.gather(1, parents_BW[:, :, None].expand(-1, -1, self.ancestors_BWS.shape[2]))
        itself = torch.eye(width, dtype=torch.bool, device=tokens_BW.device).expand(batch, -1, -1)
        self.ancestors_BWS = torch.cat([inherited, itself], dim=2)
        seen = torch.cat([self.prompt_mask_BP[:, None].expand(-1, width, -1), self.ancestors_BWS], dim=2)
        mask = additive_mask(seen, self.model.dtype)
        positions = (self.lengths_B[:, None] + self.depth).expand(-1, width)
        self.depth += 1
        return self._forward(tokens_BW, mask[:, None], positions, keep=0)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, keep: int = 1) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits.float()


def sample_seed(seed: int, sample: Sample) -> int:
    """A 63-bit seed of one sample's draws: the same however the samples are ordered or spread over engines."""
    digest = hashlib.blake2b(f"{seed}/{sample.record.source}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@torch.no_grad()
def draw(
    model: PreTrainedModel, trie: TorchTrie, samples: Sequence[Sample], sampling: Sampling
) -> tuple[np.ndarray, np.ndarray]:
    """Independent draws (or the greedy path) of one item per branch.

    Returns:
        tokens int64 [B, W, L] and their log-probabilities float32 [B, W, L] on the support they were drawn from.
    """
    batch, width, depth = len(samples), sampling.group_size, trie.trie.depth
    decoder = TreeDecoder(model, [sample.prompt_ids for sample in samples])
    logits_BWV = decoder.prefill()[:, None].expand(-1, width, -1)
    device = logits_BWV.device
    uniforms = np.stack([np.random.default_rng(sample_seed(sampling.seed, s)).random((width, depth)) for s in samples])
    uniforms_BWL = torch.from_numpy(uniforms).to(device)
    nodes_N = torch.zeros(batch * width, dtype=torch.long, device=device)
    parents_BW = torch.zeros((batch, width), dtype=torch.long, device=device)
    tokens, logps = [], []
    for level in range(depth):
        logits_NV = logits_BWV.reshape(batch * width, -1) / sampling.temperature
        if sampling.constrained:
            logps_NC, child_NC = trie.child_logps(logits_NV, nodes_N)
        else:
            logps_NC, child_NC = logits_NV.log_softmax(dim=-1), None
        if sampling.sampler == "greedy":
            place_N1 = logps_NC.argmax(dim=-1, keepdim=True)
        else:  # inverse transform sampling: one uniform a token, in float64 so that wide supports lose no mass
            cumulative = logps_NC.double().exp().cumsum(dim=-1)
            threshold = uniforms_BWL[:, :, level].reshape(-1, 1) * cumulative[:, -1:]
            place_N1 = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[1] - 1)
        logps.append(logps_NC.gather(1, place_N1).view(batch, width))
        if child_NC is None:
            token_N = place_N1[:, 0]
        else:
            nodes_N = child_NC.gather(1, place_N1)[:, 0]
            token_N = trie.token_of[nodes_N]
        tokens.append(token_N.view(batch, width))
        if level + 1 < depth:
            logits_BWV = decoder.extend(tokens[-1], parents_BW)
            parents_BW = torch.arange(width, device=device).expand(batch, -1)
    return torch.stack(tokens, dim=2).cpu().numpy(), torch.stack(logps, dim=2).cpu().numpy()


@torch.no_grad()
def beam(
    model: PreTrainedModel, trie: TorchTrie, prompts: Sequence[Sequence[int]], width: int, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The `width` most likely distinct items of the constrained policy that a beam of this width finds, best first.

    Returns:
        leaf nodes int64 [B, W], -1 where the catalogue has fewer items, and log-probabilities float32 [B, W, L] of each
        item's tokens.
    """
    batch = len(prompts)
    decoder = TreeDecoder(model, prompts)
    logits_BWV = decoder.prefill()[:, None]
    device = logits_BWV.device
    nodes_BW = torch.zeros((batch, 1), dtype=torch.long, device=device)
    scores_BW = torch.zeros((batch, 1), device=device)
    history_BWL = torch.zeros((batch, 1, 0), device=device)
    parents_BW = torch.zeros((batch, 1), dtype=torch.long, device=device)
    for level in range(trie.trie.depth):
        if level:
            logits_BWV = decoder.extend(trie.token_of[nodes_BW], parents_BW)
        now = nodes_BW.shape[1]
        logps_NC, child_NC = trie.child_logps(logits_BWV.reshape(batch * now, -1) / temperature, nodes_BW.reshape(-1))
        wide = logps_NC.shape[1]
        total = (scores_BW[:, :, None] + logps_NC.view(batch, now, wide)).view(batch, -1)
        scores_BW, flat_BW = total.topk(min(width, total.shape[1]), dim=1)
        # Places beyond the last legal path carry -inf: drop them where no prompt needs them, mark them at the end.
        needed = max(int(scores_BW.isfinite().sum(dim=1).max()), 1)
        scores_BW, flat_BW = scores_BW[:, :needed], flat_BW[:, :needed]
        step_BW = logps_NC.view(batch, -1).gather(1, flat_BW)
        nodes_BW = child_NC.view(batch, -1).gather(1, flat_BW)
        parents_BW = flat_BW // wide
        past = history_BWL.gather(1, parents_BW[:, :, None].expand(-1, -1, history_BWL.shape[2]))
        history_BWL = torch.cat([past, step_BW[:, :, None]], dim=2)
    leaves = torch.where(scores_BW.isfinite(), nodes_BW, -1)
    return leaves.cpu().numpy(), history_BWL.cpu().numpy()
