"""What a trie allows, on plain CPU logits: masked in place, or the children's values alone.

Axes: B rows of logits, V vocabulary, N rows, E children one row after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rollout.trie import SidTrie


@dataclass(frozen=True)
class Allowed:
    """Logits of the children of N nodes, ready to be sampled from.

    Attributes:
        values: [N, C] where all rows stand at one node, a view of the logits if the children's tokens have no gap; else
            [E], row n at `offsets[n] : offsets[n + 1]`.
        offsets: [N + 1], None for the two-dimensional form.
        first: the first child (a node) of each row; the child of place i of a row is `first[n] + i`.
    """

    values: np.ndarray
    offsets: np.ndarray | None
    first: np.ndarray


def allowed_logits(trie: SidTrie, logits_BV: np.ndarray, nodes_B: np.ndarray) -> Allowed:
    """The logits that the trie allows each row, all rows at nodes of one level.

    Raises:
        ValueError: when a node is a leaf, or nodes are of several levels.
    """
    starts_B, stops_B, level, base = _edges(trie, nodes_B)
    first_B = starts_B + trie.level_start[level + 1]
    edges = trie.edges[level]
    if (nodes_B == nodes_B[0]).all():  # the root, as a rule: thousands of children, all rows alike
        tokens = edges[starts_B[0] : stops_B[0]].astype(np.int64) + base
        dense = tokens[-1] - tokens[0] + 1 == len(tokens)
        values = logits_BV[:, tokens[0] : tokens[-1] + 1] if dense else logits_BV[:, tokens]
        return Allowed(values, None, first_B)
    from rollout.kernels import gather_children

    offsets = np.concatenate([[0], np.cumsum(stops_B - starts_B)])
    values = np.empty(offsets[-1], dtype=logits_BV.dtype)
    gather_children(logits_BV, np.arange(len(nodes_B)), starts_B, offsets, edges, base, values)
    return Allowed(values, offsets, first_B)


def mask_logits_(trie: SidTrie, logits_BV: torch.Tensor, rows_N: np.ndarray, nodes_N: np.ndarray) -> None:
    """Leave the children of each row's node and nothing else, in place; other rows are not touched.

    Their values are taken out, the rows filled by torch (nothing fills memory faster), and the values put back.

    Raises:
        ValueError: when a node is a leaf, or nodes are of several levels.
    """
    from rollout.kernels import gather_children, scatter_children

    starts_N, stops_N, level, base = _edges(trie, nodes_N)
    offsets = np.concatenate([[0], np.cumsum(stops_N - starts_N)])
    plain_BV, edges = logits_BV.numpy(), trie.edges[level]
    values = np.empty(offsets[-1], dtype=plain_BV.dtype)
    gather_children(plain_BV, rows_N, starts_N, offsets, edges, base, values)
    if len(rows_N) == len(logits_BV):
        logits_BV.fill_(float("-inf"))
    else:
        logits_BV.index_fill_(0, torch.from_numpy(rows_N), float("-inf"))
    scatter_children(plain_BV, rows_N, starts_N, offsets, edges, base, values)


def _edges(trie: SidTrie, nodes_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Where the children of nodes stand among the edges of their level."""
    levels = trie.level_of(nodes_N)
    level = int(levels[0])
    if level >= trie.depth or (levels != level).any():
        raise ValueError(f"nodes must be interior and of one level; they are of levels {np.unique(levels).tolist()}")
    offset = trie.level_start[level + 1]
    starts_N = trie.first_child[nodes_N].astype(np.int64) - offset
    stops_N = trie.first_child[nodes_N + 1].astype(np.int64) - offset
    return starts_N, stops_N, level, int(trie.bases[level])
