"""Views of a trie: what a request may recommend, where that is not the whole catalogue.

A view lists the leaves that are left ("these candidates") or those that are gone ("not what the user has seen"), so it
costs what it names and not what the catalogue holds. Node numbers stay those of the trie. The views of a batch stand in
one sorted array: a *place* is `view · nodes of the trie + node`, and view 0 is the whole trie, whose places are its
nodes.

Axes: V views, E places, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rollout.trie import SidTrie


@dataclass(frozen=True)
class Restriction:
    """What one request may recommend, as leaves of the trie.

    Attributes:
        only: the leaves it is restricted to, None for all.
        without: leaves that are taken away.
    """

    only: np.ndarray | None = None
    without: np.ndarray | Sequence[int] = ()


@dataclass(frozen=True)
class Views:
    """Views of one trie.

    Attributes:
        trie: the trie they are of.
        listed_V: True where a view's leaves are those that are left, False where they are those that are gone.
        leaves_E: sorted places of these leaves.
    """

    trie: SidTrie
    listed_V: np.ndarray
    leaves_E: np.ndarray

    @classmethod
    def build(cls, trie: SidTrie, restrictions: Sequence[Restriction]) -> Views:
        """One view for each restriction, numbered from 1."""
        listed, places = [False], [np.zeros(0, dtype=np.int64)]
        for view, restriction in enumerate(restrictions, 1):
            gone = np.unique(np.asarray(restriction.without, dtype=np.int64))
            listed.append(restriction.only is not None)
            named = gone if restriction.only is None else np.setdiff1d(restriction.only, gone)
            places.append(view * trie.num_nodes + named)
        return cls(trie, np.array(listed), np.concatenate(places))

    def without(self, views_N: np.ndarray, leaves_NK: np.ndarray) -> Views:
        """N new views, numbered from 1: each row's view less K more leaves (-1 for none)."""
        size, rows = self.trie.num_nodes, np.arange(1, len(views_N) + 1)
        starts, stops = (np.searchsorted(self.leaves_E, (views_N + step) * size) for step in (0, 1))
        counts = stops - starts
        shift = np.repeat(starts - np.cumsum(counts) + counts, counts)
        named = self.leaves_E[np.arange(counts.sum()) + shift] + np.repeat((rows - views_N) * size, counts)
        more_NK, there_NK = rows[:, None] * size + leaves_NK, leaves_NK >= 0
        listed_N = self.listed_V[views_N]
        left = np.setdiff1d(named, more_NK[there_NK & listed_N[:, None]])
        gone = more_NK[there_NK & ~listed_N[:, None]]
        return Views(self.trie, np.concatenate([[False], listed_N]), np.union1d(left, gone))

    def restrictions(self) -> list[tuple[bool, np.ndarray]]:
        """Of each view but the whole: whether it lists what is left, and the leaves that it names."""
        stops = np.searchsorted(self.leaves_E, self.roots_V[1:])
        parts = np.split(self.leaves_E % self.trie.num_nodes, stops)[1:]
        return list(zip(self.listed_V[1:].tolist(), parts, strict=True))

    @property
    def roots_V(self) -> np.ndarray:
        """Place of each view's root."""
        return np.arange(len(self.listed_V)) * self.trie.num_nodes

    @cached_property
    def places_E(self) -> np.ndarray:
        """Sorted places of all nodes that are left (views that list those) or gone (the others).

        An inner node is left when a leaf below it is, and gone when all its children are.
        """
        size, first_child = self.trie.num_nodes, self.trie.first_child
        current, levels = self.leaves_E, [self.leaves_E]
        for _ in range(self.trie.depth):
            view, node = np.divmod(current, size)
            parents, children = np.unique(view * size + self.trie.parents(node), return_counts=True)
            view, node = np.divmod(parents, size)
            whole = children == first_child[node + 1].astype(np.int64) - first_child[node]
            current = parents[self.listed_V[view] | whole]
            levels.append(current)
        return np.sort(np.concatenate(levels))

    @cached_property
    def sizes_V(self) -> np.ndarray:
        """Leaves of each view."""
        named = np.bincount(self.leaves_E // self.trie.num_nodes, minlength=len(self.listed_V))
        return np.where(self.listed_V, named, self.trie.num_leaves - named)
