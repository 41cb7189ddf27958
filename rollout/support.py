"""The trie as torch tensors, and log-probabilities over its children: the one distribution of this project.

At a SID position the policy is the softmax over the children of the node that the item's tokens have reached; anywhere
else it is the softmax over the whole vocabulary. Sampler, policy and reference all use the functions here.

Axes: N rows, V vocabulary, C children (padded to the widest row).
"""

from __future__ import annotations

import torch

from rollout.trie import SidTrie

WHOLE_VOCABULARY = -1


def additive_mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An attention mask to add to the scores: 0 where `seen`, the type's lowest number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


class TorchTrie:
    """A SidTrie on a device, for batched gathers of children."""

    def __init__(self, trie: SidTrie, device: torch.device | str = "cpu") -> None:
        self.trie = trie
        self.first_child = torch.from_numpy(trie.first_child.astype("int64")).to(device)
        self.level_start = torch.from_numpy(trie.level_start.astype("int64")).to(device)
        tokens = [
            torch.from_numpy(edges.astype("int64")) + int(base)
            for edges, base in zip(trie.edges, trie.bases, strict=True)
        ]
        # token_of[n]: token on the edge into node n; the root has none.
        self.token_of = torch.cat([torch.full((1,), -1), *tokens]).to(device)

    def children(self, nodes_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Child nodes [N, C] of interior nodes and the mask [N, C] of those that are there.

        Padded entries repeat a real child, so that they are safe to gather.
        """
        start, stop = self.first_child[nodes_N], self.first_child[nodes_N + 1]
        width = int((stop - start).max())
        child_NC = start[:, None] + torch.arange(width, device=nodes_N.device)
        there_NC = child_NC < stop[:, None]
        return torch.where(there_NC, child_NC, start[:, None]), there_NC

    def find(self, nodes_N: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
        """The child of each interior node along each token, -1 where there is none; no host synchronisation."""
        safe_N = nodes_N.clamp(0, len(self.first_child) - 2)
        low, stop = self.first_child[safe_N], self.first_child[safe_N + 1]
        high = stop
        for _ in range(int(self.trie.vocab_size).bit_length()):
            middle = (low + high) // 2
            below = (self.token_of[middle.clamp(max=len(self.token_of) - 1)] < tokens_N) & (low < high)
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
        found = (low < stop) & (self.token_of[low.clamp(max=len(self.token_of) - 1)] == tokens_N) & (nodes_N == safe_N)
        return torch.where(found, low, -1)

    def depths(self, nodes_N: torch.Tensor) -> torch.Tensor:
        """Level of each node (0 for the root), -1 for `WHOLE_VOCABULARY`."""
        return torch.where(nodes_N < 0, -1, torch.searchsorted(self.level_start, nodes_N.clamp(min=0), right=True) - 1)

    def token_range(self, depth: int) -> tuple[int, int]:
        """First and last + 1 of the tokens on the edges out of the nodes of a level."""
        first = int(self.trie.bases[depth])
        return first, first + int(self.trie.edges[depth].max()) + 1

    def child_logps(
        self, logits_NV: torch.Tensor, nodes_N: torch.Tensor, first_token: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-softmax over the children of each node.

        Args:
            logits_NV: logits of the vocabulary, or of a range of it that holds all children.
            nodes_N: interior nodes.
            first_token: token of the first column.

        Returns:
            log-probabilities [N, C] in float32 (-inf on padding) and child nodes [N, C].
        """
        child_NC, there_NC = self.children(nodes_N)
        if len(nodes_N) and bool((nodes_N == nodes_N[0]).all()):  # one support for all rows, as at the root
            logits_NC = logits_NV.index_select(1, self.token_of[child_NC[0]] - first_token)
        else:
            logits_NC = logits_NV.gather(1, self.token_of[child_NC] - first_token)
        logits_NC = logits_NC.float().masked_fill(~there_NC, float("-inf"))
        return logits_NC.log_softmax(dim=-1), child_NC

    def token_logps(
        self, logits_NV: torch.Tensor, nodes_N: torch.Tensor, tokens_N: torch.Tensor, first_token: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token on its support, and the entropy of that support.

        Args:
            logits_NV: logits, already divided by the temperature; of a range of tokens that holds all supports.
            nodes_N: the node each row stands at, or `WHOLE_VOCABULARY` (-1) where the support is the vocabulary.
            tokens_N: the token each row wrote; at a node it must be a child.
            first_token: token of the first column.

        Returns:
            `(logps_N, entropies_N)`, float32, differentiable in the logits.

        Raises:
            ValueError: when a token is no child of its node.
        """
        logps_N = logits_NV.new_zeros(len(nodes_N), dtype=torch.float32)
        entropies_N = torch.zeros_like(logps_N)
        depths_N = self.depths(nodes_N)
        for depth in depths_N.unique().tolist():  # rows of one depth have supports of similar width
            rows = (depths_N == depth).nonzero()[:, 0]
            if depth < 0:
                support = logits_NV[rows].float().log_softmax(dim=-1)
                place = tokens_N[rows, None] - first_token
            else:
                support, child = self.child_logps(logits_NV[rows], nodes_N[rows], first_token)
                hit = (self.token_of[child] == tokens_N[rows, None]) & support.isfinite()
                if not bool(hit.any(dim=1).all()):
                    bad = int(rows[~hit.any(dim=1)][0])
                    raise ValueError(
                        f"row {bad}: token {int(tokens_N[bad])} does not follow node {int(nodes_N[bad])} in the trie"
                    )
                place = hit.int().argmax(dim=1, keepdim=True)
            logps_N = logps_N.index_copy(0, rows, support.gather(1, place)[:, 0])
            finite = support.masked_fill(support.isinf(), 0.0)  # 0 · log 0 = 0
            entropies_N = entropies_N.index_copy(0, rows, -(support.exp() * finite).sum(dim=-1))
        return logps_N, entropies_N
