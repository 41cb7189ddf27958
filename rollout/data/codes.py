"""Columns of codes from list columns, checked all at once. Axes: N rows, L levels."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from rollout.data.problems import short

MAX_CODEBOOK = 65536
"""Where sizes are inferred, a code at or above this is a damaged one: no tokenizer has room for such a level."""


def infer_size(largest_code: int, floor: int) -> int:
    """Smallest power of two that holds every code, and at least `floor`."""
    return max(floor, 1 << int(largest_code).bit_length())


def list_lengths(lists: pa.Array) -> np.ndarray:
    """Length of every list, -1 for null."""
    return np.asarray(lists.value_lengths().fill_null(-1)).astype(np.int64)


def usual_length(lengths_N: np.ndarray) -> int:
    """The commonest length above 0 (0 when there is none)."""
    counts = np.bincount(lengths_N[lengths_N > 0], minlength=1)
    return int(counts.argmax())


def rows_of_length(lists: pa.Array, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of one length as a matrix.

    Returns:
        The values [N, length] (zeros where a row does not fit) and, per row, whether it fits: it is not null, has that
        length and no null inside.
    """
    lengths_N = list_lengths(lists)
    flat = lists.flatten()
    row_of_value = np.repeat(np.arange(len(lists)), np.maximum(lengths_N, 0))
    fits_N = lengths_N == length
    fits_N[row_of_value[np.asarray(flat.is_null())]] = False
    values = np.asarray(flat.fill_null(0))
    out_NL = np.zeros((len(lists), length), dtype=values.dtype)
    out_NL[fits_N] = values[fits_N[row_of_value]].reshape(int(fits_N.sum()), length)
    return out_NL, fits_N


def sid_problems(
    lists: pa.Array, codes_NL: np.ndarray, fits_N: np.ndarray, sizes: tuple[int, ...]
) -> dict[int, tuple[str, str]]:
    """Kind and detail of every row whose Sid does not fit `sizes`, by row."""
    problems = {}
    for row in np.flatnonzero(~fits_N).tolist():
        sid = lists[row].as_py()
        if sid is None:
            problems[row] = ("missing-field", "the item has no sid")
        elif len(sid) != len(sizes):
            problems[row] = ("wrong-depth", f"sid {short(sid)} has {len(sid)} levels, the catalogue has {len(sizes)}")
        else:
            problems[row] = ("bad-sid", f"sid {short(sid)} lacks a code")
    bad_NL = ((codes_NL < 0) | (codes_NL >= np.array(sizes))) & fits_N[:, None]
    for row in np.flatnonzero(bad_NL.any(axis=1)).tolist():
        level = int(bad_NL[row].argmax())
        code = codes_NL[row, level]
        problems[row] = ("code-out-of-range", f"code {code} is out of range [0, {sizes[level]}) at level {level}")
    return problems
