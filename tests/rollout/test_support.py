"""Trie-support log-probabilities against a mask over the whole vocabulary, written with Python sets.

Axes: N rows, V vocabulary, C children.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rollout.support import WHOLE_VOCABULARY, TorchTrie
from rollout.trie import SidTrie
from tests.oracle import Path_, legal_next

VOCAB = 40
SEEDS = range(6)


def random_paths(seed: int) -> list[Path_]:
    """Random paths: depth 1 to 4, narrow and wide levels, levels that share token ids."""
    rng = np.random.default_rng(seed)
    depth = 1 + seed % 4
    low = rng.integers(0, VOCAB // 2, depth)
    width = rng.choice([1, 3, VOCAB // 2], depth)
    rows = rng.integers(low, low + width, (int(rng.integers(1, 60)), depth))
    return sorted({tuple(row) for row in rows.tolist()})


def prefixes_of(paths: list[Path_]) -> list[Path_]:
    """Prefixes that end at an interior node."""
    return sorted({path[:cut] for path in paths for cut in range(len(paths[0]))})


def node_of(trie: SidTrie, prefix: Path_) -> int:
    return int(trie.walk(np.array([prefix], dtype=np.int64).reshape(1, -1))[0, -1])


def mask_of(paths: list[Path_], prefixes: list[Path_ | None]) -> torch.Tensor:
    """0 where a token may follow, -inf elsewhere, [N, V]; None stands for the whole vocabulary."""
    mask_NV = torch.full((len(prefixes), VOCAB), float("-inf"))
    for row, prefix in enumerate(prefixes):
        mask_NV[row, list(range(VOCAB)) if prefix is None else legal_next(paths, prefix)] = 0.0
    return mask_NV


def logits_for(rows: int, seed: int) -> torch.Tensor:
    return 4 * torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed))


# --- children and find


@pytest.mark.parametrize("seed", SEEDS)
def test_child_logps_equal_a_masked_softmax(seed: int) -> None:
    paths = random_paths(seed)
    trie = TorchTrie(SidTrie.from_paths(paths, VOCAB))
    prefixes = prefixes_of(paths)
    nodes_N = torch.tensor([node_of(trie.trie, prefix) for prefix in prefixes])
    logits_NV = logits_for(len(prefixes), seed)
    expected_NV = (logits_NV + mask_of(paths, list(prefixes))).log_softmax(dim=-1)
    logps_NC, child_NC = trie.child_logps(logits_NV, nodes_N)
    assert logps_NC.dtype == torch.float32
    for row, prefix in enumerate(prefixes):
        legal = legal_next(paths, prefix)
        there = logps_NC[row].isfinite()
        assert trie.tokens(child_NC[row, there]).tolist() == legal
        torch.testing.assert_close(logps_NC[row, there], expected_NV[row, legal], atol=1e-6, rtol=1e-6)
        assert bool((logps_NC[row, ~there] == float("-inf")).all())
        # Padding repeats a real child, so that it can be gathered.
        assert set(trie.tokens(child_NC[row, ~there]).tolist()) <= set(legal)


@pytest.mark.parametrize("seed", SEEDS)
def test_many_rows_at_one_node(seed: int) -> None:
    """All rows at one node take a short cut; mixed rows do not. Both are the same."""
    paths = random_paths(seed)
    trie = TorchTrie(SidTrie.from_paths(paths, VOCAB))
    logits_NV = logits_for(5, seed)
    for prefix in prefixes_of(paths)[:5]:
        node = node_of(trie.trie, prefix)
        together, _ = trie.child_logps(logits_NV, torch.full((5,), node))
        expected = (logits_NV + mask_of(paths, [prefix] * 5)).log_softmax(dim=-1)[:, legal_next(paths, prefix)]
        torch.testing.assert_close(together, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_find_equals_the_numpy_trie(seed: int) -> None:
    paths = random_paths(seed)
    numpy_trie = SidTrie.from_paths(paths, VOCAB)
    trie = TorchTrie(numpy_trie)
    nodes = np.repeat(np.arange(-1, numpy_trie.num_nodes), VOCAB + 2)  # dead prefixes and leaves have no children
    tokens = np.tile(np.arange(-1, VOCAB + 1), numpy_trie.num_nodes + 1)
    found = trie.find(torch.from_numpy(nodes), torch.from_numpy(tokens))
    np.testing.assert_array_equal(found.numpy(), numpy_trie.find(nodes, tokens))


# --- token_logps


def rows_of(paths: list[Path_], trie: SidTrie, rng: np.random.Generator) -> tuple[list[Path_ | None], list[int], list]:
    """Every interior prefix and as many whole-vocabulary rows, shuffled: prefixes, nodes, tokens."""
    prefixes: list[Path_ | None] = [*prefixes_of(paths), *([None] * len(prefixes_of(paths)))]
    prefixes = [prefixes[index] for index in rng.permutation(len(prefixes))]
    nodes = [WHOLE_VOCABULARY if prefix is None else node_of(trie, prefix) for prefix in prefixes]
    tokens = [int(rng.choice(range(VOCAB) if prefix is None else legal_next(paths, prefix))) for prefix in prefixes]
    return prefixes, nodes, tokens


@pytest.mark.parametrize("seed", SEEDS)
def test_token_logps_entropy_and_gradient(seed: int) -> None:
    paths = random_paths(seed)
    trie = TorchTrie(SidTrie.from_paths(paths, VOCAB))
    prefixes, nodes, tokens = rows_of(paths, trie.trie, np.random.default_rng(seed))
    rows = len(prefixes)
    logits_NV = logits_for(rows, seed).requires_grad_()
    logps_N, entropies_N = trie.token_logps(logits_NV, torch.tensor(nodes), torch.tensor(tokens))

    plain_NV = logits_NV.detach().double().requires_grad_()
    softmax = torch.where(mask_of(paths, prefixes) == 0, plain_NV, float("-inf")).log_softmax(dim=-1)
    expected_N = softmax.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    expected_entropies_N = -(softmax.exp() * softmax.masked_fill(softmax.isinf(), 0.0)).sum(dim=-1)
    torch.testing.assert_close(logps_N, expected_N.float(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropies_N, expected_entropies_N.float(), atol=2e-6, rtol=1e-5)
    assert logps_N.dtype == entropies_N.dtype == torch.float32

    weights = torch.linspace(-1, 1, rows)
    (weights * logps_N + 0.3 * entropies_N).sum().backward()
    (weights.double() * expected_N + 0.3 * expected_entropies_N).sum().backward()
    assert logits_NV.grad is not None and plain_NV.grad is not None
    assert bool(logits_NV.grad.isfinite().all())
    torch.testing.assert_close(logits_NV.grad, plain_NV.grad.float(), atol=2e-6, rtol=1e-5)
    illegal = mask_of(paths, prefixes) != 0
    assert bool((logits_NV.grad[illegal] == 0).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_full_vocabulary_minus_trie_is_the_legal_mass(seed: int) -> None:
    """log p_vocab(token) - log p_trie(token) = log Z, Z the vocabulary's mass on the legal tokens."""
    paths = random_paths(seed)
    trie = TorchTrie(SidTrie.from_paths(paths, VOCAB))
    prefixes = prefixes_of(paths)
    tokens_N = torch.tensor([legal_next(paths, prefix)[-1] for prefix in prefixes])
    logits_NV = logits_for(len(prefixes), seed)
    on_trie, _ = trie.token_logps(logits_NV, torch.tensor([node_of(trie.trie, p) for p in prefixes]), tokens_N)
    whole, _ = trie.token_logps(logits_NV, torch.full((len(prefixes),), WHOLE_VOCABULARY), tokens_N)
    legal_mass_N = torch.stack(
        [logits_NV[row].softmax(-1)[legal_next(paths, p)].sum() for row, p in enumerate(prefixes)]
    )
    torch.testing.assert_close(whole - on_trie, legal_mass_N.log(), atol=5e-6, rtol=1e-5)


def test_token_logps_by_hand() -> None:
    """Children {1, 3} of the root with logits 0 and log 3: probabilities 1/4 and 3/4."""
    trie = TorchTrie(SidTrie.from_paths([(3, 7), (1, 9), (3, 5)], 10))
    logits_V = torch.full((10,), 50.0)  # illegal tokens are far likelier and count for nothing
    logits_V[[1, 3]] = torch.tensor([0.0, math.log(3)])
    logits_NV = logits_V.expand(3, -1).clone()
    logits_NV[2] = 0.0
    logps, entropies = trie.token_logps(logits_NV, torch.tensor([0, 0, WHOLE_VOCABULARY]), torch.tensor([1, 3, 4]))
    torch.testing.assert_close(logps, torch.tensor([0.25, 0.75, 0.1]).log())
    both = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(entropies, torch.tensor([both, both, math.log(10)]))


def test_an_only_child_is_certain_and_has_no_gradient() -> None:
    trie = TorchTrie(SidTrie.from_paths([(3, 7), (1, 9), (3, 5)], 10))
    logits_NV = logits_for(1, 0)[:, :10].requires_grad_()
    logps, entropies = trie.token_logps(logits_NV, torch.tensor([1]), torch.tensor([9]))
    (logps + entropies).sum().backward()
    assert logps.tolist() == [0.0] and entropies.tolist() == [0.0]
    assert logits_NV.grad is not None and logits_NV.grad.abs().max() == 0


def test_half_precision_logits_are_scored_in_float32() -> None:
    trie = TorchTrie(SidTrie.from_paths([(token,) for token in range(VOCAB)], VOCAB))
    logits_NV = logits_for(1, 3).bfloat16()
    logps, _ = trie.token_logps(logits_NV, torch.tensor([0]), torch.tensor([5]))
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, logits_NV.float().log_softmax(-1)[:, 5])


@pytest.mark.parametrize(
    ("nodes", "tokens", "row"),
    [([0, 0], [1, 2], 1), ([2], [9], 0), ([WHOLE_VOCABULARY, 1, 1], [4, 9, 5], 2), ([1, 2], [9, 6], 1)],
)
def test_an_illegal_token_raises(nodes: list[int], tokens: list[int], row: int) -> None:
    """The row is named. The children of node 1 (token 1) are {9}, those of node 2 (token 3) are {5, 7}."""
    trie = TorchTrie(SidTrie.from_paths([(3, 7), (1, 9), (3, 5)], 10))
    with pytest.raises(ValueError, match=f"row {row}: token {tokens[row]} does not follow node {nodes[row]} "):
        trie.token_logps(torch.zeros(len(nodes), 10), torch.tensor(nodes), torch.tensor(tokens))


def test_no_rows() -> None:
    trie = TorchTrie(SidTrie.from_paths([(3, 7)], 10))
    logps, entropies = trie.token_logps(torch.zeros(0, 10), torch.zeros(0, dtype=torch.long), torch.zeros(0).long())
    assert logps.shape == entropies.shape == (0,)
