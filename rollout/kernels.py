"""Compiled loops over rows of logits on the CPU; importing this loads numba.

vLLM 0.32 does not start by itself once numba is imported: its scan of modules meets llvmlite's library wrapper, which
`rollout/vllm_engine.py` hides from it.

Axes: B rows of logits, V vocabulary, N rows to treat, E edges.
"""

from __future__ import annotations

import numba
import numpy as np


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


@numba.njit(parallel=True, cache=True)
def scatter_children(
    logits_BV: np.ndarray,
    rows_N: np.ndarray,
    starts_N: np.ndarray,
    offsets_N: np.ndarray,
    edges_E: np.ndarray,
    base: int,
    values_E: np.ndarray,
) -> None:
    """Put back what `gather_children` took."""
    for n in numba.prange(len(rows_N)):
        row = rows_N[n]
        shift = starts_N[n] - offsets_N[n]
        for place in range(offsets_N[n], offsets_N[n + 1]):
            logits_BV[row, np.int64(edges_E[place + shift]) + base] = values_E[place]
