"""Views of a trie against Python sets: what is left, what is gone, one batch of many views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.support import TorchTrie
from rollout.trie import SidTrie
from rollout.views import Restriction, Views
from tests.oracle import Path_, legal_next

VOCAB = 40


def paths_of(seed: int, count: int = 60) -> list[Path_]:
    rng = np.random.default_rng(seed)
    codes = np.minimum(rng.geometric(0.3, (count, 3)), 7) + np.array([0, 10, 14])
    return sorted({tuple(path) for path in codes.tolist()})


def shown(trie: TorchTrie, place: int, depth: int) -> list[int]:
    """Tokens after a place, by the code under test."""
    child_NC, there_NC = trie.children(torch.tensor([place]))
    assert set(trie.tokens(child_NC[0], depth + 1).tolist()) == set(
        trie.tokens(child_NC[0][there_NC[0]], depth + 1).tolist()
    ), "padding repeats real children"
    return trie.tokens(child_NC[0][there_NC[0]]).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.booleans(), min_size=1, max_size=4), st.booleans())
def test_every_prefix_of_every_view(seed: int, listed: list[bool], unsorted: bool) -> None:
    """Children and tokens of all prefixes are those of the paths that are left; others lead nowhere."""
    paths, rng = paths_of(seed), np.random.default_rng(seed)
    rows = rng.permutation(len(paths)) if unsorted else np.arange(len(paths))
    base = SidTrie.from_paths(np.array(paths)[rows], VOCAB)
    some = [rng.choice(len(paths), int(rng.integers(1, len(paths))), replace=False) for _ in listed]
    leaves = [base.leaves(np.argsort(rows)[chosen]) for chosen in some]
    restrictions = [
        Restriction(only=leaf) if one else Restriction(without=leaf) for one, leaf in zip(listed, leaves, strict=True)
    ]
    views = Views.build(base, restrictions)
    trie = TorchTrie(base).under(views)
    left = [paths] + [
        [path for index, path in enumerate(paths) if (index in set(chosen.tolist())) == one]
        for one, chosen in zip(listed, some, strict=True)
    ]
    assert views.sizes_V.tolist() == [len(one) for one in left]
    for view, allowed in enumerate(left):
        for depth in range(3):
            for prefix in {path[:depth] for path in paths}:
                place = torch.tensor([views.roots_V[view]])
                for step, token in enumerate(prefix):
                    place = trie.find(place, torch.tensor([token]), step if unsorted else None)
                if prefix and prefix not in {path[:depth] for path in allowed}:
                    assert int(place) == -1
                    continue
                assert int(trie.depths(place)) == depth
                if depth < 3:
                    assert shown(trie, int(place), depth) == legal_next(allowed, prefix)


def test_places_name_what_is_left_or_gone() -> None:
    """Hand-made: paths 1-3, 1-4, 2-5; taking 2-5 away takes its parent, taking 1-3 away does not."""
    trie = SidTrie.from_paths([[1, 3], [1, 4], [2, 5]], 10)
    assert trie.leaves([0, 1, 2]).tolist() == [3, 4, 5]
    views = Views.build(trie, [Restriction(without=[5]), Restriction(without=[3]), Restriction(only=np.array([4]))])
    size = trie.num_nodes
    assert size == 6
    assert views.places_E.tolist() == [size + 2, size + 5, 2 * size + 3, 3 * size, 3 * size + 1, 3 * size + 4]
    assert views.sizes_V.tolist() == [3, 2, 2, 1]
    empty = Views.build(trie, [Restriction(without=[3, 4, 5]), Restriction(only=np.array([3]), without=[3])])
    assert empty.sizes_V.tolist() == [3, 0, 0]


def test_without_takes_more_away() -> None:
    """Rows of one batch, each from its own view and less its own leaves; -1 takes nothing."""
    paths = paths_of(5)
    trie = SidTrie.from_paths(paths, VOCAB)
    first = int(trie.level_start[-2])
    only, gone = first + np.array([0, 3, 4, 9]), first + np.array([1, 2])
    views = Views.build(trie, [Restriction(only=only), Restriction(without=gone)])
    taken = np.array([[first + 3, -1], [first + 7, first + 1], [first + 7, first + 8], [-1, -1]])
    less = views.without(np.array([1, 2, 0, 1]), taken)
    given_ = [(listed, leaves.tolist()) for listed, leaves in less.restrictions()]
    assert given_ == [
        (True, [first, first + 4, first + 9]),
        (False, [first + 1, first + 2, first + 7]),
        (False, [first + 7, first + 8]),
        (True, only.tolist()),
    ]


def test_logps_are_those_of_what_is_left() -> None:
    """A softmax over the children that a view shows, differentiable, rows of several views at once."""
    paths = paths_of(2)
    trie = SidTrie.from_paths(paths, VOCAB)
    first = int(trie.level_start[-2])
    views = Views.build(trie, [Restriction(without=[first]), Restriction(only=first + np.arange(3))])
    seen = TorchTrie(trie).under(views)
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0), requires_grad=True)
    places, tokens = torch.from_numpy(views.roots_V), torch.tensor([paths[0][0]] * 3)
    logps, _ = seen.token_logps(logits, places, tokens)
    left = [paths, paths[1:], paths[:3]]
    for row, allowed in enumerate(left):
        legal = legal_next(allowed, ())
        expected = logits[row, legal].log_softmax(dim=0)[legal.index(paths[0][0])]
        torch.testing.assert_close(logps[row], expected)
    with pytest.raises(ValueError, match="does not follow"):
        seen.token_logps(logits[2:], places[2:], torch.tensor([paths[-1][0]]))


def test_a_view_costs_what_it_names() -> None:
    """Ten candidates of 200,000 items: places of ten paths, not of the catalogue."""
    codes = np.unique(np.random.default_rng(0).integers(0, 256, (200_000, 3)), axis=0)
    trie = SidTrie.from_paths(codes + np.array([0, 256, 512]), 768)
    leaves = trie.leaves(np.arange(0, len(codes), len(codes) // 10)[:10])
    assert len(Views.build(trie, [Restriction(only=leaves)]).places_E) <= 10 * 4
    assert len(Views.build(trie, [Restriction(without=leaves)]).places_E) <= 10 * 4
