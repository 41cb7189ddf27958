"""Items and their Sids, with collisions explicit.

Axes: N items, S distinct Sids, L levels, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rollout.sid import Sid, SidFormat


@dataclass(frozen=True)
class Item:
    """One item of a catalogue. `index` is its row; `item_id` is the name that the data gives it."""

    index: int
    item_id: str
    sid: Sid
    title: str
    category: str


@dataclass(frozen=True, eq=False)
class Catalog:
    """Items as columns. Several items may share a Sid; both directions of that relation are kept.

    Attributes:
        format: how Sids are written.
        item_ids: the data's own names, unique, length N.
        codes_NL: codes of every item, int64 [N, L].
        titles: length N, "" where unknown.
        categories: length N, "" where unknown.
        popularity_N: interactions per item in the training data (zeros where unknown).
        embeddings_ND: optional float32 item embeddings, for intra-list distance.

    Raises:
        ValueError: on an empty catalogue, columns of unequal length, repeated item ids or codes out of range.
    """

    format: SidFormat
    item_ids: tuple[str, ...]
    codes_NL: np.ndarray
    titles: tuple[str, ...]
    categories: tuple[str, ...]
    popularity_N: np.ndarray
    embeddings_ND: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.item_ids)
        if n == 0:
            raise ValueError("the catalogue is empty: no item to recommend")
        if self.codes_NL.shape != (n, self.format.depth):
            raise ValueError(
                f"{n} items of {self.format.depth} levels need codes of that shape, got {self.codes_NL.shape}"
            )
        for name in ("titles", "categories", "popularity_N", "embeddings_ND"):
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise ValueError(f"catalogue column {name} has {len(column)} rows for {n} items")
        if len(self.index_of) != n:
            seen: set[str] = set()
            twice = next(i for i in self.item_ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
            raise ValueError(f"item id {twice!r} stands twice in the catalogue")
        bad = (self.codes_NL < 0) | (self.codes_NL >= np.array(self.format.sizes))
        if bad.any():
            row, level = np.argwhere(bad)[0]
            raise ValueError(
                f"item {self.item_ids[row]!r}: code {self.codes_NL[row, level]} is out of range "
                f"[0, {self.format.sizes[level]}) at level {level}"
            )
        for array in (self.codes_NL, self.popularity_N, self.embeddings_ND):
            if array is not None:
                array.setflags(write=False)  # rewards of strangers are called with this object

    @classmethod
    def build(
        cls,
        fmt: SidFormat,
        item_ids: Sequence[str],
        codes_NL: np.ndarray,
        *,
        titles: Sequence[str] | None = None,
        categories: Sequence[str] | None = None,
        popularity_N: np.ndarray | None = None,
        embeddings_ND: np.ndarray | None = None,
    ) -> Catalog:
        """A catalogue from columns; those left out become blanks and zeros."""
        n = len(item_ids)
        return cls(
            format=fmt,
            item_ids=tuple(str(i) for i in item_ids),
            codes_NL=np.array(codes_NL, dtype=np.int64).reshape(n, -1) if n else np.zeros((0, fmt.depth), np.int64),
            titles=tuple(titles) if titles is not None else ("",) * n,
            categories=tuple(categories) if categories is not None else ("",) * n,
            popularity_N=np.zeros(n) if popularity_N is None else np.array(popularity_N, dtype=np.float64),
            embeddings_ND=None if embeddings_ND is None else np.array(embeddings_ND, dtype=np.float32),
        )

    def __len__(self) -> int:
        return len(self.item_ids)

    def item(self, index: int) -> Item:
        """One row as an Item."""
        return Item(index, self.item_ids[index], self.sid(index), self.titles[index], self.categories[index])

    def sid(self, index: int) -> Sid:
        """The Sid of an item."""
        return tuple(int(code) for code in self.codes_NL[index])

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Row of each item id."""
        return {item_id: index for index, item_id in enumerate(self.item_ids)}

    @cached_property
    def sids_SL(self) -> np.ndarray:
        """The distinct Sids, int32 [S, L], in lexicographic order; a *sid index* is a row of it."""
        return self._unique[0]

    @cached_property
    def sid_index_N(self) -> np.ndarray:
        """The sid index of every item, int64 [N]."""
        return self._unique[1]

    @cached_property
    def sid_index_of(self) -> dict[Sid, int]:
        """The sid index of every Sid."""
        return {tuple(int(c) for c in sid): index for index, sid in enumerate(self.sids_SL)}

    @cached_property
    def cluster_sizes_S(self) -> np.ndarray:
        """Number of items that share each Sid, int64 [S]."""
        return np.bincount(self.sid_index_N, minlength=len(self.sids_SL))

    def items_of_sid(self, sid_index: int) -> tuple[int, ...]:
        """Every item written as this Sid, in row order."""
        start, stop = self._cluster_offsets[sid_index : sid_index + 2]
        return tuple(int(i) for i in self._cluster_items[start:stop])

    @property
    def collisions(self) -> int:
        """Number of items beyond the first of their Sid (0 when every item has a Sid of its own)."""
        return len(self) - len(self.sids_SL)

    @cached_property
    def _unique(self) -> tuple[np.ndarray, np.ndarray]:
        sids, inverse = np.unique(self.codes_NL, axis=0, return_inverse=True)
        return sids.astype(np.int32), inverse.reshape(-1)

    @cached_property
    def _cluster_items(self) -> np.ndarray:
        return np.argsort(self.sid_index_N, kind="stable")

    @cached_property
    def _cluster_offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.cluster_sizes_S)])
