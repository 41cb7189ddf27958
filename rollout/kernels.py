"""Compiled loops over rows of logits on the CPU; importing this loads numba.

vLLM 0.32 does not start by itself once numba is imported: its scan of modules meets llvmlite's library wrapper, which
`rollout/vllm_engine.py` hides from it.

Axes: B rows of logits, V vocabulary, N rows to treat, E edges.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(parallel=True, cache=True)
def keep_children(
    logits_BV: np.ndarray, rows_N: np.ndarray, starts_N: np.ndarray, stops_N: np.ndarray, edges_E: np.ndarray, base: int
) -> None:
    """All but the children of each row's node becomes -inf, in place.

    The children of row n are `edges[starts[n] : stops[n]] + base`, ascending, so that each row is written once from
    left to right and its children are stepped over.
    """
    width = logits_BV.shape[1]
    for n in numba.prange(len(rows_N)):
        row = rows_N[n]
        place = np.int64(0)
        for edge in range(starts_N[n], stops_N[n]):
            token = np.int64(edges_E[edge]) + base
            for column in range(place, token):
                logits_BV[row, column] = -np.inf
            place = token + 1
        for column in range(place, width):
            logits_BV[row, column] = -np.inf


@numba.njit(parallel=True, cache=True)
def gather_children(
    logits_BV: np.ndarray,
    rows_N: np.ndarray,
    starts_N: np.ndarray,
    offsets_N: np.ndarray,
    edges_E: np.ndarray,
    base: int,
    values_E: np.ndarray,
) -> None:
    """The children's logits of each row, one after the other: those of row n at `offsets[n] : offsets[n + 1]`."""
    for n in numba.prange(len(rows_N)):
        row = rows_N[n]
        shift = starts_N[n] - offsets_N[n]
        for place in range(offsets_N[n], offsets_N[n + 1]):
            values_E[place] = logits_BV[row, np.int64(edges_E[place + shift]) + base]
