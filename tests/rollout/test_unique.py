"""Draws without replacement: the ordered draws, who is in, and what they estimate, against exact probabilities."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from transformers import Qwen3ForCausalLM

from rollout.decode import Decoder
from rollout.hf_engine import HFEngine
from rollout.types import RolloutGroup, Sample, Sampling
from tests import oracle

FEW = [3, 40, 41, 90, 150]
DRAWS = 3000


def copies(sample: Sample, count: int) -> list[Sample]:
    """One prompt under many names: each draws by a seed of its own."""
    return [replace(sample, record=replace(sample.record, source=f"copy:{one}")) for one in range(count)]


def small(tiny_decoder: Decoder) -> Decoder:
    """The same tokens, five items."""
    return Decoder(tiny_decoder.catalog, tiny_decoder.trie.subset(FEW))


def probabilities(model: Qwen3ForCausalLM, decoder: Decoder, sample: Sample, temperature: float) -> dict[int, float]:
    """Exact probability of each sid of a decoder."""
    paths = [tuple(path) for path in decoder.paths.tolist()]
    logps = oracle.token_logps(model, sample.prompt_ids, np.array(paths), paths, temperature).sum(axis=1)
    return dict(zip(decoder.trie.row_of_leaf.tolist(), np.exp(logps).tolist(), strict=True))


def order_of(group: RolloutGroup) -> tuple[int, ...]:
    return tuple(rollout.sids[0] for rollout in group.rollouts)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_ordered_draws_are_plackett_luce(
    tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder, tiny_samples: list[Sample], temperature: float
) -> None:
    """P(a, b, c) = p_a · p_b / (1 - p_a) · p_c / (1 - p_a - p_b), over all 60 ordered triples of five items."""
    decoder, sample = small(tiny_decoder), tiny_samples[5]
    share = probabilities(tiny_model, decoder, sample, temperature)
    expected = {}
    for triple in permutations(FEW, 3):
        left, chance = 1.0, 1.0
        for item in triple:
            chance, left = chance * share[item] / left, left - share[item]
        expected[triple] = chance
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-4)
    engine = HFEngine(tiny_model, decoder, max_batch_prompts=512)
    groups = engine.generate(copies(sample, DRAWS), Sampling(3, "unique", temperature=temperature, seed=3))
    counts: dict[tuple[int, ...], int] = dict.fromkeys(expected, 0)
    for group in groups:
        counts[order_of(group)] += 1
    error = sum(abs(counts[triple] / DRAWS - chance) for triple, chance in expected.items()) / 2
    noise = sum((chance * (1 - chance) / DRAWS) ** 0.5 for chance in expected.values()) * 0.4
    assert error < 1.5 * noise  # total variation; its expectation is about `noise`
    assert max(share.values()) < 0.95 and len([count for count in counts.values() if count]) > 20


def test_inclusion_weights_estimate_without_bias(
    tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder, tiny_samples: list[Sample]
) -> None:
    """The mean of Σ p / q · f over the drawn ones is Σ p · f, item by item (f the indicator of an item)."""
    decoder, sample = small(tiny_decoder), tiny_samples[5]
    share = probabilities(tiny_model, decoder, sample, 2.5)
    engine = HFEngine(tiny_model, decoder, max_batch_prompts=512)
    groups = engine.generate(copies(sample, DRAWS), Sampling(2, "unique", temperature=2.5, seed=8))
    estimates = np.zeros((DRAWS, len(FEW)))
    for row, group in enumerate(groups):
        for rollout in group.rollouts:
            estimates[row, FEW.index(rollout.sids[0])] = np.exp(rollout.logp - rollout.logp_inclusion)
            assert -1e-9 <= -rollout.logp_inclusion < 20
    error = estimates.mean(axis=0) - np.array([share[item] for item in FEW])
    assert (np.abs(error) < 4 * estimates.std(axis=0) / DRAWS**0.5).all()


def test_all_distinct_legal_and_scored(
    hf_engine: HFEngine, tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder, tiny_samples: list[Sample]
) -> None:
    paths = [tuple(path) for path in tiny_decoder.paths.tolist()]
    for group in hf_engine.generate(tiny_samples, Sampling(20, "unique", seed=1, temperature=0.8)):
        assert len(set(order_of(group))) == 20
        tokens = np.array([rollout.token_ids for rollout in group.rollouts])
        exact = oracle.token_logps(tiny_model, group.sample.prompt_ids, tokens, paths, 0.8)
        np.testing.assert_allclose([r.logps_sampler for r in group.rollouts], exact, atol=1e-4)


@pytest.mark.parametrize("asked", [5, 8])
def test_fewer_items_than_asked_for(
    tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder, tiny_samples: list[Sample], asked: int
) -> None:
    """All of them, each certain to be in, and no junk."""
    groups = HFEngine(tiny_model, small(tiny_decoder)).generate(tiny_samples[:6], Sampling(asked, "unique", seed=2))
    for group in groups:
        assert sorted(order_of(group)) == FEW
        assert [rollout.logp_inclusion for rollout in group.rollouts] == [0.0] * 5
    assert len({order_of(group) for group in groups}) > 1


def test_one_item(tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder, tiny_samples: list[Sample]) -> None:
    one = HFEngine(tiny_model, Decoder(tiny_decoder.catalog, tiny_decoder.trie.subset([17])))
    for group in one.generate(tiny_samples[:3], Sampling(4, "unique")):
        assert order_of(group) == (17,) and group.rollouts[0].logps_sampler == (0.0, 0.0, 0.0)


def test_a_sample_draws_the_same_in_any_batch(hf_engine: HFEngine, tiny_samples: list[Sample]) -> None:
    sampling = Sampling(6, "unique", seed=9)
    together = [order_of(group) for group in hf_engine.generate(tiny_samples, sampling)]
    backwards = [order_of(group) for group in hf_engine.generate(tiny_samples[::-1], sampling)][::-1]
    alone = [order_of(hf_engine.generate([sample], sampling)[0]) for sample in tiny_samples]
    assert together == backwards == alone
    other = [order_of(group) for group in hf_engine.generate(tiny_samples, Sampling(6, "unique", seed=10))]
    assert sum(one != two for one, two in zip(together, other, strict=True)) > len(tiny_samples) // 2


def test_low_temperature_lists_the_beam(hf_engine: HFEngine, tiny_samples: list[Sample]) -> None:
    """Where the noise is small against the log-probabilities the first draw is the likeliest item."""
    cold = hf_engine.generate(tiny_samples, Sampling(1, "unique", temperature=0.01))
    best = hf_engine.generate(tiny_samples, Sampling(30, "beam", temperature=0.01))
    same = [order_of(one)[0] == order_of(two)[0] for one, two in zip(cold, best, strict=True)]
    assert np.mean(same) > 0.9


def test_it_needs_the_trie() -> None:
    with pytest.raises(ValueError, match="sampler='unique' lists items of the trie"):
        Sampling(2, "unique", constrained=False)
