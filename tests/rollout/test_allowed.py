"""Masks and gathers on plain logits, against sets of legal tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.allowed import allowed_logits, mask_logits_
from rollout.trie import SidTrie
from tests import oracle

VOCAB = 40


def world(seed: int, items: int, spread: int) -> tuple[SidTrie, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    paths = rng.integers(0, spread, (items, 3)) + np.array([3, 3 + spread // 2, VOCAB - spread])
    return SidTrie.from_paths(paths, VOCAB), paths, rng


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    items=st.integers(1, 60),
    spread=st.integers(1, 12),
    level=st.integers(0, 2),
    count=st.sampled_from([1, 6, 9]),
)
def test_mask_leaves_the_children(seed: int, items: int, spread: int, level: int, count: int) -> None:
    trie, paths, rng = world(seed, items, spread)
    logits = rng.normal(size=(9, VOCAB)).astype(np.float32)
    before, memory = logits.copy(), logits.ctypes.data
    rows = rng.permutation(9)[:count]
    prefixes = paths[rng.integers(0, items, count), :level]
    mask_logits_(trie, torch.from_numpy(logits), rows, trie.walk(prefixes)[:, -1])
    assert logits.ctypes.data == memory
    for row in set(range(9)) - set(rows.tolist()):
        np.testing.assert_array_equal(logits[row], before[row])
    for row, prefix in zip(rows, prefixes.tolist(), strict=True):
        legal = oracle.legal_next(paths.tolist(), prefix)
        np.testing.assert_array_equal(logits[row, legal], before[row, legal])
        assert np.isneginf(np.delete(logits[row], legal)).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), items=st.integers(1, 60), spread=st.integers(1, 12), level=st.integers(0, 2))
def test_allowed_are_the_childrens_logits(seed: int, items: int, spread: int, level: int) -> None:
    trie, paths, rng = world(seed, items, spread)
    logits = rng.normal(size=(7, VOCAB)).astype(np.float32)
    prefixes = paths[rng.integers(0, items, 7), :level]
    found = allowed_logits(trie, logits, trie.walk(prefixes)[:, -1])
    for row, prefix in enumerate(prefixes.tolist()):
        legal = oracle.legal_next(paths.tolist(), prefix)
        values = found.values[row] if found.offsets is None else found.values[slice(*found.offsets[row : row + 2])]
        np.testing.assert_array_equal(values, logits[row, legal])
        assert trie.token_of(found.first[row] + np.arange(len(legal))).tolist() == legal


def test_a_level_without_gaps_is_a_view() -> None:
    paths = np.array([(a, 10 + b) for a in range(4) for b in range(3)])
    logits = np.zeros((5, 20), dtype=np.float32)
    found = allowed_logits(SidTrie.from_paths(paths, 20), logits, np.zeros(5, dtype=np.int64))
    assert found.values.shape == (5, 4) and np.shares_memory(found.values, logits)


def test_nodes_that_do_not_fit() -> None:
    trie = SidTrie.from_paths(np.array([(1, 2), (1, 3)]), 5)
    logits = torch.zeros((2, 5))
    for nodes in ([2, 3], [0, 1]):
        with pytest.raises(ValueError, match="interior and of one level"):
            mask_logits_(trie, logits, np.arange(2), np.array(nodes))
