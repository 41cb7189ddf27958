"""Residual k-means (RQ-KMeans): each level clusters what the levels before have left over.

Axes: N items, D dimensions, L levels, C codes of a level.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np


def residual_kmeans(
    vectors_ND: np.ndarray,
    sizes: tuple[int, ...],
    *,
    balanced: bool,
    seed: int,
    iterations: int = 25,
    report: Callable[[int, int], None] = lambda level, levels: None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Codes [N, L] and the levels' codebooks [C, D].

    Args:
        vectors_ND: the embeddings.
        sizes: codes of each level.
        balanced: no cluster of a level gets more than its share of items (rounded up).
        seed: of the first centroids.
        iterations: of Lloyd's algorithm.
        report: called with level and levels as it goes.

    Raises:
        ValueError: when a level has more codes than there are items.
    """
    left_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    codes, books = [], []
    for level, size in enumerate(sizes):
        if size > len(left_ND):
            raise ValueError(f"level {level} has {size} codes for {len(left_ND)} items: take fewer codes")
        report(level + 1, len(sizes))
        means = faiss.Kmeans(
            left_ND.shape[1], size, niter=iterations, seed=seed + level, min_points_per_centroid=1,
            max_points_per_centroid=256, verbose=False,
        )  # fmt: skip
        means.train(left_ND)
        book_CD = np.array(means.centroids, dtype=np.float32)
        code_N = assign_balanced(left_ND, book_CD) if balanced else means.index.search(left_ND, 1)[1][:, 0]
        if balanced:  # the clusters are others now: so are their centres
            book_CD = _centres(left_ND, code_N, book_CD)
        codes.append(code_N)
        books.append(book_CD)
        left_ND = left_ND - book_CD[code_N]
    return np.stack(codes, axis=1), books


def assign_balanced(vectors_ND: np.ndarray, book_CD: np.ndarray) -> np.ndarray:
    """The nearest centroid that has room [N]; each takes ceil(N / C) items at most, its nearest ones first.

    Items bid for their nearest centroid with room; a centroid keeps the nearest bidders; the others bid again. No item
    that was kept is moved later, so that a few rounds are enough.
    """
    room_C = np.full(len(book_CD), -(-len(vectors_ND) // len(book_CD)))
    code_N = np.full(len(vectors_ND), -1)
    waiting = np.arange(len(vectors_ND))
    while len(waiting):
        open_codes = np.flatnonzero(room_C)
        index = faiss.IndexFlatL2(book_CD.shape[1])
        index.add(np.ascontiguousarray(book_CD[open_codes]))
        distance_W1, nearest_W1 = index.search(np.ascontiguousarray(vectors_ND[waiting]), 1)
        wish_W = open_codes[nearest_W1[:, 0]]
        order = np.lexsort((distance_W1[:, 0], wish_W))  # by centroid, the nearest first
        starts = np.searchsorted(wish_W[order], wish_W[order])
        kept = np.arange(len(order)) - starts < room_C[wish_W[order]]
        taken = order[kept]
        code_N[waiting[taken]] = wish_W[taken]
        room_C -= np.bincount(wish_W[taken], minlength=len(room_C))
        waiting = np.sort(waiting[order[~kept]])
    return code_N


def _centres(vectors_ND: np.ndarray, code_N: np.ndarray, book_CD: np.ndarray) -> np.ndarray:
    sums_CD = np.zeros_like(book_CD)
    np.add.at(sums_CD, code_N, vectors_ND)
    count_C = np.bincount(code_N, minlength=len(book_CD))[:, None]
    return np.where(count_C > 0, sums_CD / np.maximum(count_C, 1), book_CD).astype(np.float32)
