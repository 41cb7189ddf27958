"""SidTrie: the catalogue's legal token paths as immutable CSR arrays.

Nodes are numbered breadth first: the root is 0, the nodes of a level are contiguous, and the children of consecutive
nodes are consecutive, so one pointer array per trie and one edge label per node hold everything. A leaf is a Sid.

Axes: N paths, L levels, B batch rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

ILLEGAL = -1


@dataclass(frozen=True)
class SidTrie:
    """Immutable trie over token ids; build it with `from_paths`.

    Attributes:
        level_start: int64 [L + 2]; nodes of depth d (the root has depth 0) are `level_start[d] : level_start[d + 1]`.
        first_child: int32 [interior nodes + 1]; the children of interior node n are
            `first_child[n] : first_child[n + 1]`.
        edges: per depth d >= 1, the label of the edge into each node of that depth, ascending among siblings, stored
            relative to `bases[d - 1]` in the smallest unsigned type that holds it.
        bases: int64 [L]; smallest token id of each level.
        leaf_rows: int32 [leaves]; first input path that ends at each leaf (the sid index for a catalogue's trie). Empty
            where leaf i is path i, as for the sorted, distinct paths of a catalogue.
        vocab_size: number of token ids of the model; every edge is below it.
    """

    level_start: np.ndarray
    first_child: np.ndarray
    edges: tuple[np.ndarray, ...]
    bases: np.ndarray
    leaf_rows: np.ndarray
    vocab_size: int

    @classmethod
    def from_paths(cls, paths_NL: np.ndarray | Sequence[Sequence[int]], vocab_size: int) -> SidTrie:
        """Build from token paths in any order; repeated paths become one leaf.

        Raises:
            ValueError: when there is no path, no level, or a token id outside `[0, vocab_size)` (row and level named).
        """
        paths = np.asarray(paths_NL)
        if paths.ndim != 2 or paths.shape[0] == 0:
            raise ValueError(
                f"a trie needs paths of shape [N, L] with N >= 1, got {paths.shape}: the catalogue is empty"
            )
        n, depth = paths.shape
        if depth == 0:
            raise ValueError("a trie needs at least one level")
        if not np.issubdtype(paths.dtype, np.integer):
            raise ValueError(f"token ids must be integers, got {paths.dtype}")
        outside = (paths < 0) | (paths >= vocab_size)
        if outside.any():
            row, level = np.argwhere(outside)[0]
            raise ValueError(
                f"path {row}, level {level}: token id {paths[row, level]} is outside the vocabulary [0, {vocab_size})"
            )

        # Already sorted input (the usual case: catalogues keep their Sids sorted) skips the sort.
        is_sorted = _ascending(paths)
        order = np.arange(n) if is_sorted else np.lexsort(paths.T[::-1])
        ordered = paths if is_sorted else paths[order]
        fresh = np.ones((n, depth), dtype=bool)  # fresh[i, l]: row i opens a new node at depth l + 1
        for level in range(depth):
            np.not_equal(ordered[1:, level], ordered[:-1, level], out=fresh[1:, level])
            if level:
                fresh[1:, level] |= fresh[1:, level - 1]

        counts = fresh.sum(axis=0)
        level_start = np.concatenate([[0, 1], 1 + np.cumsum(counts)]).astype(np.int64)
        bases = paths.min(axis=0).astype(np.int64)
        edges, pointers = [], []
        for level in range(depth):
            labels = ordered[fresh[:, level], level] - bases[level]
            edges.append(labels.astype(np.min_scalar_type(int(labels.max()))))
            parents_open = fresh[:, level - 1] if level else np.arange(n) == 0
            # Position among this level's new nodes at which each parent's children begin.
            begin = (np.cumsum(fresh[:, level]) - 1)[parents_open]
            pointers.append(level_start[level + 1] + begin)
        first_child = np.concatenate([*pointers, [level_start[-1]]]).astype(np.int32)
        plain = is_sorted and bool(fresh[:, -1].all())
        leaf_rows = np.empty(0, dtype=np.int32) if plain else order[fresh[:, -1]].astype(np.int32)
        return cls(level_start, first_child, tuple(edges), bases, leaf_rows, int(vocab_size))

    @property
    def depth(self) -> int:
        """Number of levels L; every path has this many tokens."""
        return len(self.edges)

    @property
    def num_leaves(self) -> int:
        """Number of distinct paths."""
        return int(self.level_start[-1] - self.level_start[-2])

    @property
    def row_of_leaf(self) -> np.ndarray:
        """Input path of each leaf, int32 [leaves]."""
        return self.leaf_rows if len(self.leaf_rows) else np.arange(self.num_leaves, dtype=np.int32)

    @property
    def num_nodes(self) -> int:
        """Number of nodes, the root included."""
        return int(self.level_start[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.level_start, self.first_child, self.bases, self.leaf_rows, *self.edges)
        return sum(array.nbytes for array in arrays)

    def level_of(self, nodes_B: np.ndarray) -> np.ndarray:
        """Depth of each node (0 for the root, L for leaves)."""
        return np.searchsorted(self.level_start, nodes_B, side="right") - 1

    def children(self, node: int) -> np.ndarray:
        """Token ids that may follow `node`, ascending. Raises ValueError at a leaf or for a node that is not there."""
        if not 0 <= node < self.level_start[-2]:
            raise ValueError(f"node {node} has no children: interior nodes are 0 to {self.level_start[-2] - 1}")
        depth = int(self.level_of(np.asarray(node)))
        start, stop = (
            self.first_child[node] - self.level_start[depth + 1],
            self.first_child[node + 1] - self.level_start[depth + 1],
        )
        return self.edges[depth][start:stop].astype(np.int64) + self.bases[depth]

    def children_batch(self, nodes_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Children of many nodes as CSR: `(tokens, offsets)`, row b's are `tokens[offsets[b]:offsets[b + 1]]`.

        Raises:
            ValueError: when a node is a leaf or not in the trie.
        """
        nodes_B = np.asarray(nodes_B, dtype=np.int64)
        if len(nodes_B) and (nodes_B.min() < 0 or nodes_B.max() >= self.level_start[-2]):
            raise ValueError(
                f"nodes must be interior, 0 to {self.level_start[-2] - 1}; got {nodes_B.min()} to {nodes_B.max()}"
            )
        starts = self.first_child[nodes_B].astype(np.int64)
        counts = self.first_child[nodes_B + 1] - starts
        offsets = np.concatenate([[0], np.cumsum(counts)])
        child = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return self.token_of(child), offsets

    def token_of(self, nodes_B: np.ndarray) -> np.ndarray:
        """The token on the edge into each node. Raises ValueError for the root and for nodes that are not there."""
        nodes_B = np.asarray(nodes_B, dtype=np.int64)
        if len(nodes_B) and (nodes_B.min() < 1 or nodes_B.max() >= self.num_nodes):
            raise ValueError(
                f"nodes with an edge are 1 to {self.num_nodes - 1}; got {nodes_B.min()} to {nodes_B.max()}"
            )
        depths = self.level_of(nodes_B)
        tokens = np.empty(len(nodes_B), dtype=np.int64)
        for depth in range(1, self.depth + 1):
            rows = depths == depth
            tokens[rows] = (
                self.edges[depth - 1][nodes_B[rows] - self.level_start[depth]].astype(np.int64) + self.bases[depth - 1]
            )
        return tokens

    def find(self, nodes_B: np.ndarray, tokens_B: np.ndarray) -> np.ndarray:
        """The child of each node along each token, `ILLEGAL` (-1) where there is none (leaves and -1 have none)."""
        nodes_B, tokens_B = np.asarray(nodes_B, dtype=np.int64), np.asarray(tokens_B, dtype=np.int64)
        if nodes_B.shape != tokens_B.shape:
            raise ValueError(f"{nodes_B.shape} nodes and {tokens_B.shape} tokens: one token a node")
        result = np.full(len(nodes_B), ILLEGAL, dtype=np.int64)
        depths = np.where(nodes_B >= 0, self.level_of(np.maximum(nodes_B, 0)), -1)
        for depth in range(self.depth):
            rows = np.flatnonzero(depths == depth)
            if not len(rows):
                continue
            edges, offset = self.edges[depth], self.level_start[depth + 1]
            low = self.first_child[nodes_B[rows]].astype(np.int64) - offset
            stop = self.first_child[nodes_B[rows] + 1].astype(np.int64) - offset
            wanted = tokens_B[rows] - self.bases[depth]
            high = stop.copy()
            while (low < high).any():  # binary search, all rows at once: log2(widest node) rounds
                middle = (low + high) // 2
                below = (edges[np.minimum(middle, len(edges) - 1)] < wanted) & (low < high)
                low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
            here = low < stop
            here[here] = edges[low[here]] == wanted[here]
            result[rows[here]] = low[here] + offset
        return result

    def advance(self, nodes_B: np.ndarray, tokens_B: np.ndarray) -> np.ndarray:
        """Like `find`, but a prefix that leaves the trie raises ValueError: nothing is ever silently allowed."""
        result = self.find(nodes_B, tokens_B)
        if (result == ILLEGAL).any():
            row = int(np.flatnonzero(result == ILLEGAL)[0])
            raise ValueError(
                f"row {row}: token {np.asarray(tokens_B)[row]} does not follow node {np.asarray(nodes_B)[row]}: "
                "the prefix leaves the trie"
            )
        return result

    def walk(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Node before each token of paths from the root, int64 [B, T + 1]; -1 once a path has left the trie."""
        tokens_BT = np.asarray(tokens_BT, dtype=np.int64)
        nodes = np.zeros((tokens_BT.shape[0], tokens_BT.shape[1] + 1), dtype=np.int64)
        for step in range(tokens_BT.shape[1]):
            nodes[:, step + 1] = self.find(nodes[:, step], tokens_BT[:, step])
        return nodes

    def rows(self, leaves_B: np.ndarray) -> np.ndarray:
        """Input row (sid index) of each leaf, -1 for a node that is no leaf."""
        leaves_B = np.asarray(leaves_B, dtype=np.int64)
        index = leaves_B - self.level_start[-2]
        leaf = (index >= 0) & (index < self.num_leaves)
        rows = self.leaf_rows[np.where(leaf, index, 0)] if len(self.leaf_rows) else index
        return np.where(leaf, rows, ILLEGAL)

    def parents(self, nodes_B: np.ndarray) -> np.ndarray:
        """The parent of each node; that of the root is -1."""
        nodes_B = np.asarray(nodes_B, dtype=self.first_child.dtype)  # else numpy would copy all pointers
        return np.searchsorted(self.first_child, nodes_B, side="right") - 1  # the last pointer at or before a node

    def leaves(self, rows_B: np.ndarray | Sequence[int]) -> np.ndarray:
        """Leaf of each input row (sid index). Raises ValueError for one that is not here."""
        rows_B = np.asarray(rows_B, dtype=np.int64)
        index = rows_B
        if len(self.leaf_rows):
            place = np.searchsorted(self.leaf_rows, rows_B, sorter=self._by_row).clip(max=self.num_leaves - 1)
            index = np.where(self.leaf_rows[self._by_row[place]] == rows_B, self._by_row[place], -1)
        absent = rows_B[(index < 0) | (index >= self.num_leaves)]
        if len(absent):
            raise ValueError(f"{len(absent)} of {len(rows_B)} sids are not in the trie, first {absent[:5].tolist()}")
        return index + self.level_start[-2]

    def paths(self, leaves_B: np.ndarray | None = None) -> np.ndarray:
        """Token ids [B, L] of some leaves; of every leaf in order if none are named."""
        if leaves_B is None:
            leaves_B = np.arange(self.level_start[-2], self.level_start[-1])
        columns = [np.asarray(leaves_B, dtype=np.int64)]
        for _ in range(self.depth - 1):
            columns.append(self.parents(columns[-1]))
        return np.stack([self.token_of(nodes) for nodes in reversed(columns)], axis=1)

    def subset(self, leaf_rows: np.ndarray | Sequence[int]) -> SidTrie:
        """A trie of some leaves only, named by input row (sid index). Raises ValueError for one that is not here."""
        leaves = np.unique(self.leaves(leaf_rows))
        part = SidTrie.from_paths(self.paths(leaves), self.vocab_size)
        return replace(part, leaf_rows=self.rows(leaves).astype(np.int32))

    @cached_property
    def _by_row(self) -> np.ndarray:
        return np.argsort(self.leaf_rows, kind="stable")

    def save(self, folder: str | Path) -> None:
        """Write plain .npy arrays and a JSON header, which `load` can map into memory."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in self._arrays().items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        header = {"kind": "sidrl.trie", "version": 2, "depth": self.depth, "vocab_size": self.vocab_size}
        (folder / "trie.json").write_text(json.dumps(header))

    @classmethod
    def load(cls, folder: str | Path) -> SidTrie:
        """Map a saved trie into memory. Raises ValueError when the folder is no trie or a part of it is broken."""
        folder = Path(folder)
        try:
            header = json.loads((folder / "trie.json").read_text())
            depth = int(header["depth"])
            names = [
                "level_start",
                "first_child",
                "bases",
                "leaf_rows",
                *(f"edges_{level}" for level in range(depth)),
            ]
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
            if header["kind"] != "sidrl.trie" or header["version"] != 2:
                raise ValueError(f"header says {header}")
        except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} is not a saved trie, or is broken: {error}") from error
        edges = tuple(arrays[f"edges_{level}"] for level in range(depth))
        trie = cls(
            arrays["level_start"],
            arrays["first_child"],
            edges,
            arrays["bases"],
            arrays["leaf_rows"],
            int(header["vocab_size"]),
        )
        sizes = np.diff(trie.level_start)[1:]
        if (
            len(trie.bases) != depth
            or [len(e) for e in edges] != sizes.tolist()
            or len(trie.first_child) != trie.level_start[-2] + 1
            or len(trie.leaf_rows) not in (0, sizes[-1])
        ):
            raise ValueError(f"{folder}: the arrays of this trie do not fit together; write it again")
        return trie

    def _arrays(self) -> dict[str, np.ndarray]:
        named = {
            "level_start": self.level_start,
            "first_child": self.first_child,
            "bases": self.bases,
            "leaf_rows": self.leaf_rows,
        }
        return named | {f"edges_{level}": edges for level, edges in enumerate(self.edges)}


def _ascending(paths_NL: np.ndarray) -> bool:
    """Whether paths stand in lexicographic order, equal ones beside each other."""
    above, below = paths_NL[:-1], paths_NL[1:]
    good = below[:, -1] >= above[:, -1]
    for level in reversed(range(paths_NL.shape[1] - 1)):
        good &= below[:, level] == above[:, level]
        good |= below[:, level] > above[:, level]
    return bool(good.all())
