"""Tokens back to items."""

from __future__ import annotations

import numpy as np
import pytest

from rollout.catalog import Catalog
from rollout.decode import Decoder
from rollout.sid import SidVocab
from rollout.types import Sample


def test_leaves_are_the_catalogues_sid_indices(tiny_decoder: Decoder, tiny_vocab: SidVocab) -> None:
    catalog, trie = tiny_decoder.catalog, tiny_decoder.trie
    assert trie.num_leaves == len(catalog.sids_SL) < len(catalog)
    np.testing.assert_array_equal(tiny_decoder.paths, tiny_vocab.paths(catalog.sids_SL))
    leaves = trie.walk(tiny_decoder.paths)[:, -1]
    np.testing.assert_array_equal(trie.rows(leaves), np.arange(len(catalog.sids_SL)))


def test_group_of_legal_and_illegal_rollouts(tiny_decoder: Decoder, tiny_samples: list[Sample]) -> None:
    """A whole item with all that share its Sid, a path that leaves the trie, one that never was on it."""
    catalog = tiny_decoder.catalog
    shared = int(np.argmax(catalog.cluster_sizes_S))
    path = tiny_decoder.paths[shared]
    children = set(tiny_decoder.trie.children(int(tiny_decoder.trie.walk(path[None])[0, 2])).tolist())
    last = tiny_decoder.paths[:, 2]
    stray = next(int(token) for token in last if int(token) not in children)
    tokens = np.array([path, [path[0], path[1], stray], [path[0], path[0], path[2]], [0, 1, 2]])
    logps = -np.arange(12.0).reshape(4, 3)
    group = tiny_decoder.group(tiny_samples[3], tokens, logps, False, 7)
    assert group.sample is tiny_samples[3] and group.policy_version == 7
    assert [rollout.finish_reason for rollout in group.rollouts] == ["item", "illegal", "illegal", "illegal"]
    assert [rollout.sids for rollout in group.rollouts] == [(shared,), (), (), ()]
    (items,) = group.rollouts[0].items
    assert len(items) > 1 and items == tuple(np.flatnonzero(catalog.sid_index_N == shared).tolist())
    for rollout, wrote, scores in zip(group.rollouts, tokens.tolist(), logps.tolist(), strict=True):
        assert rollout.token_ids == tuple(wrote)
        assert rollout.logps_sampler == tuple(scores) and rollout.logp == sum(scores)
        assert rollout.on_trie == (False, False, False)
    assert tiny_decoder.group(tiny_samples[3], tokens[:1], logps[:1], True, 7).rollouts[0].on_trie == (True,) * 3


def test_every_item_is_decoded_from_its_own_tokens(
    tiny_decoder: Decoder, tiny_vocab: SidVocab, tiny_samples: list[Sample]
) -> None:
    catalog = tiny_decoder.catalog
    tokens = tiny_vocab.paths(catalog.codes_NL)
    group = tiny_decoder.group(tiny_samples[0], tokens, np.zeros(tokens.shape), True, 0)
    for item, rollout in enumerate(group.rollouts):
        assert item in rollout.items[0] and rollout.sids == (catalog.sid_index_N[item],)


def test_the_start_of_an_item_is_no_item(tiny_decoder: Decoder, tiny_samples: list[Sample]) -> None:
    group = tiny_decoder.group(tiny_samples[0], tiny_decoder.paths[:3, :2], np.zeros((3, 2)), True, 0)
    assert not any(rollout.legal for rollout in group.rollouts)


def test_a_model_without_the_tokens_is_refused(tiny_catalog: Catalog, tiny_vocab: SidVocab) -> None:
    with pytest.raises(ValueError, match=r"outside the vocabulary \[0, 290\)"):
        Decoder.build(tiny_catalog, tiny_vocab, 290)
