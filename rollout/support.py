"""The trie as torch tensors, and log-probabilities over its children: the one distribution of this project.

At a SID position the policy is the softmax over the children of the node that the item's tokens have reached; anywhere
else it is the softmax over the whole vocabulary. Sampler, policy and reference all use the functions here.

Axes: N rows, V vocabulary, C children (padded to the widest row).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from rollout.trie import SidTrie
from rollout.views import Views

WHOLE_VOCABULARY, TEXT = -1, -3
"""In place of a place of the trie: any token, or any that free text may hold."""


def additive_mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An attention mask to add to the scores: 0 where `seen`, the type's lowest number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def ban_(logits_NV: torch.Tensor, banned: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Take ranges of tokens out of logits, in place."""
    for first, stop in banned:
        logits_NV[:, first:stop] = float("-inf")
    return logits_NV


class TorchTrie:
    """A SidTrie on a device, for batched gathers of children. On the CPU it shares the trie's memory.

    Methods take and give *places*, which here are nodes; `under` gives the same for views of the trie. `banned` are the
    ranges of tokens that free text may not hold.
    """

    def __init__(
        self, trie: SidTrie, device: torch.device | str = "cpu", banned: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.trie, self.banned = trie, banned
        self.device = torch.device(device)
        self.first_child = _tensor(trie.first_child).to(device)
        self.level_start = _tensor(trie.level_start).to(device)
        self._edges = [_tensor(edges).to(device) for edges in trie.edges]
        self._ranges = [
            (int(base), int(base) + int(e.max()) + 1) for base, e in zip(trie.bases, trie.edges, strict=True)
        ]

    def under(self, views: Views | None) -> TorchTrie:
        """The trie as views show it; None shows the whole."""
        return self if views is None else ViewedTrie(self, views)

    def nodes(self, places_N: torch.Tensor) -> torch.Tensor:
        """The node of each place."""
        return places_N

    def children(self, places_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Child places [N, C] of interior places and the mask [N, C] of those that are there.

        Padded entries repeat a real child, so that they are safe to gather.
        """
        start, stop = self._child_range(places_N)
        width = int((stop - start).max())
        child_NC = start[:, None] + torch.arange(width, device=self.device)
        there_NC = child_NC < stop[:, None]
        return torch.where(there_NC, child_NC, start[:, None]), there_NC

    def find(self, places_N: torch.Tensor, tokens_N: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """The child of each place along each token, -1 where there is none; no host synchronisation.

        Args:
            places_N: where to look; leaves and -1 have no children.
            tokens_N: a token each.
            depth: level of all places, if it is known: saves time.
        """
        found_N = torch.full_like(places_N, -1)
        for level in range(self.trie.depth) if depth is None else [depth]:
            first, stop = self.trie.level_start[level : level + 2].tolist()
            here_N = (places_N >= first) & (places_N < stop)
            low, end = self._child_range(torch.where(here_N, places_N, first))
            high, last = end, int(self.trie.level_start[level + 2]) - 1
            first_token, stop_token = self._ranges[level]
            for _ in range((stop_token - first_token).bit_length()):  # siblings have distinct tokens
                middle = (low + high) // 2
                below = (self.tokens(middle.clamp(max=last), level + 1) < tokens_N) & (low < high)
                low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
            hit_N = here_N & (low < end) & (self.tokens(low.clamp(max=last), level + 1) == tokens_N)
            found_N = torch.where(hit_N, low, found_N)
        return found_N

    def tokens(self, places: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """The token on the edge into each place (-1 for roots); places of one known depth take a single gather."""
        nodes = self.nodes(places)
        tokens = torch.full_like(nodes, -1)
        for level in range(self.trie.depth) if depth is None else [depth - 1]:
            start, stop = self.trie.level_start[level + 1 : level + 3].tolist()
            at = nodes - start
            label = _wide(self._edges[level][at if depth else at.clamp(0, stop - start - 1)])
            label = label + int(self.trie.bases[level])
            tokens = label if depth else torch.where((nodes >= start) & (nodes < stop), label, tokens)
        return tokens

    def depths(self, places_N: torch.Tensor) -> torch.Tensor:
        """Level of each place (0 for a root); `WHOLE_VOCABULARY` and `TEXT` are their own."""
        nodes_N = self.nodes(places_N.clamp(min=0))
        return torch.where(places_N < 0, places_N, torch.searchsorted(self.level_start, nodes_N, right=True) - 1)

    def _child_range(self, nodes_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first_child[nodes_N].long(), self.first_child[nodes_N + 1].long()

    def token_range(self, depth: int) -> tuple[int, int]:
        """First and last + 1 of the tokens on the edges out of the nodes of a level."""
        return self._ranges[depth]

    def child_logps(
        self, logits_NV: torch.Tensor, places_N: torch.Tensor, *, temperature: float = 1.0, first_token: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-softmax over the children of places.

        Args:
            logits_NV: logits of the vocabulary, or of a range of it that holds all children.
            places_N: interior places.
            temperature: logits are divided by it.
            first_token: token of the first column.

        Returns:
            log-probabilities [N, C] in float32 (-inf on padding) and child places [N, C].
        """
        child_NC, there_NC = self.children(places_N)
        depths_N = self.depths(places_N) + 1
        depth = int(depths_N[0]) if len(places_N) and bool((depths_N == depths_N[0]).all()) else None
        if len(places_N) and bool((places_N == places_N[0]).all()):  # one support for all rows, as at the root
            logits_NC = logits_NV.index_select(1, self.tokens(child_NC[0], depth) - first_token)
        else:
            logits_NC = logits_NV.gather(1, self.tokens(child_NC, depth) - first_token)
        logits_NC = (logits_NC.float() / temperature).masked_fill(~there_NC, float("-inf"))
        return logits_NC.log_softmax(dim=-1), child_NC

    def token_logps(
        self, logits_NV: torch.Tensor, nodes_N: torch.Tensor, tokens_N: torch.Tensor, first_token: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each token on its support, and the entropy of that support.

        Args:
            logits_NV: logits, already divided by the temperature; of a range of tokens that holds all supports.
            nodes_N: the place each row stands at, `WHOLE_VOCABULARY` or `TEXT`.
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
                logits = logits_NV[rows].float()
                support = (ban_(logits, self.banned) if depth == TEXT else logits).log_softmax(dim=-1)
                place = tokens_N[rows, None] - first_token
            else:
                support, child = self.child_logps(logits_NV[rows], nodes_N[rows], first_token=first_token)
                hit = (self.tokens(child, depth + 1) == tokens_N[rows, None]) & support.isfinite()
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


class ViewedTrie(TorchTrie):
    """A trie as views show it; places say which view a node is seen through."""

    def __init__(self, base: TorchTrie, views: Views) -> None:
        self.__dict__.update(base.__dict__)
        self.base = base
        end = np.array([np.iinfo(np.int64).max])
        self._places = torch.from_numpy(np.concatenate([views.places_E, end])).to(base.device)
        self._listed = torch.from_numpy(views.listed_V).to(base.device)

    def nodes(self, places_N: torch.Tensor) -> torch.Tensor:
        """The node of each place."""
        return places_N % self.trie.num_nodes

    def children(self, places_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TorchTrie.children`."""
        view_N, node_N = places_N // self.trie.num_nodes, self.nodes(places_N)
        offset_N, listed_N = view_N * self.trie.num_nodes, self._listed[view_N]
        start_N, stop_N = self._child_range(node_N)
        low_N, high_N = (torch.searchsorted(self._places, offset_N + at) for at in (start_N, stop_N))
        count_N = torch.where(listed_N, high_N - low_N, stop_N - start_N)
        step_NC = torch.arange(int(count_N.max()), device=self.device).expand(len(places_N), -1)
        there_NC = step_NC < count_N[:, None]
        step_NC = torch.where(there_NC, step_NC, 0)
        listed_NC = self._places[(low_N[:, None] + step_NC).clamp(max=len(self._places) - 1)]
        child_NC = torch.where(listed_N[:, None], listed_NC, (offset_N + start_N)[:, None] + step_NC)
        there_NC = there_NC & self._shown(child_NC, listed_N[:, None])
        return torch.where(there_NC, child_NC, child_NC.gather(1, there_NC.int().argmax(dim=1, keepdim=True))), there_NC

    def find(self, places_N: torch.Tensor, tokens_N: torch.Tensor, depth: int | None = None) -> torch.Tensor:
        """See `TorchTrie.find`."""
        view_N = places_N.clamp(min=0) // self.trie.num_nodes
        node_N = torch.where(places_N < 0, -1, self.nodes(places_N))
        child_N = self.base.find(node_N, tokens_N, depth)
        place_N = view_N * self.trie.num_nodes + child_N
        return torch.where((child_N >= 0) & self._shown(place_N, self._listed[view_N]), place_N, -1)

    def _shown(self, places: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
        """Whether views show these places; `listed` says of each whether its view lists what is left."""
        return (self._places[torch.searchsorted(self._places, places)] == places) == listed


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A view of an array that may be mapped read-only. Torch indexes no unsigned types: see `_wide`."""
    signed = {"uint16": np.int16, "uint32": np.int32}.get(array.dtype.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array.view(signed) if signed else array)


def _wide(labels: torch.Tensor) -> torch.Tensor:
    """Labels that `_tensor` may have made signed, as int64."""
    unsigned = {torch.int16: 0xFFFF, torch.int32: 0xFFFFFFFF}.get(labels.dtype)
    return labels.long() & unsigned if unsigned else labels.long()
