"""Search under the trie against scoring every item on its own, without cache, padding, batch or trie.

Axes: B prompts, W branches, S Sids, L levels.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from rollout.catalog import Catalog
from rollout.decode import Decoder
from rollout.hf_engine import HFEngine
from rollout.search import beam, draw, sample_seed
from rollout.sid import SidVocab, letters_format
from rollout.support import TorchTrie
from rollout.tree_decoder import TreeDecoder
from rollout.trie import SidTrie
from rollout.types import RolloutGroup, Sample, Sampling
from tests import oracle


@pytest.fixture(scope="module")
def trie(tiny_decoder: Decoder) -> TorchTrie:
    return TorchTrie(tiny_decoder.trie)


@pytest.fixture(scope="module")
def paths(tiny_decoder: Decoder) -> list[oracle.Path_]:
    """Token path of every Sid."""
    return [tuple(path) for path in tiny_decoder.paths.tolist()]


@pytest.fixture(scope="module")
def exact(tiny_model: Qwen3ForCausalLM, tiny_samples: list[Sample], paths: list[oracle.Path_]) -> list[np.ndarray]:
    """Per sample, the exact log-probabilities [S, L] of all items."""
    return [oracle.token_logps(tiny_model, sample.prompt_ids, np.array(paths), paths) for sample in tiny_samples]


def subset(tiny_decoder: Decoder, rows: list[int]) -> Decoder:
    """The same tokens, fewer items."""
    return Decoder(tiny_decoder.catalog, tiny_decoder.trie.subset(rows))


def written(groups: list[RolloutGroup]) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in group.rollouts] for group in groups]


def test_the_world_is_worth_testing_on(exact: list[np.ndarray]) -> None:
    """The oracle's probabilities sum to one, are peaked, and differ between prompts."""
    for logps_SL in exact:
        assert np.exp(logps_SL.sum(axis=1)).sum() == pytest.approx(1.0, abs=1e-5)
    probabilities = np.exp(np.stack([logps_SL.sum(axis=1) for logps_SL in exact]))
    assert np.median(probabilities.max(axis=1)) > 10 / probabilities.shape[1]
    assert len(set(probabilities.argmax(axis=1))) > len(exact) // 3


# --- log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("constrained", [True, False])
def test_logps_of_draws(
    tiny_model: Qwen3ForCausalLM,
    trie: TorchTrie,
    paths: list[oracle.Path_],
    tiny_samples: list[Sample],
    temperature: float,
    constrained: bool,
) -> None:
    sampling = Sampling(5, temperature=temperature, constrained=constrained, seed=3)
    tokens_BWL, logps_BWL = draw(tiny_model, trie, tiny_samples, sampling)
    assert tokens_BWL.shape == logps_BWL.shape == (len(tiny_samples), 5, 3)
    support = paths if constrained else None
    for sample, tokens_WL, logps_WL in zip(tiny_samples, tokens_BWL, logps_BWL, strict=True):
        expected = oracle.token_logps(tiny_model, sample.prompt_ids, tokens_WL, support, temperature)
        np.testing.assert_allclose(logps_WL, expected, atol=2e-5)
        if constrained:
            assert {tuple(tokens) for tokens in tokens_WL.tolist()} <= set(paths)


def test_greedy_is_the_argmax_path(
    tiny_model: Qwen3ForCausalLM, trie: TorchTrie, paths: list[oracle.Path_], tiny_samples: list[Sample]
) -> None:
    tokens_BWL, logps_BWL = draw(tiny_model, trie, tiny_samples, Sampling(2, "greedy"))
    for sample, tokens_WL, logps_WL in zip(tiny_samples, tokens_BWL, logps_BWL, strict=True):
        best = oracle.greedy_path(tiny_model, sample.prompt_ids, paths)
        assert [tuple(tokens) for tokens in tokens_WL.tolist()] == [best, best]
        expected = oracle.token_logps(tiny_model, sample.prompt_ids, tokens_WL, paths)
        np.testing.assert_allclose(logps_WL, expected, atol=2e-5)


def test_bfloat16_models_are_searched_too(
    tiny_model: Qwen3ForCausalLM, trie: TorchTrie, paths: list[oracle.Path_], tiny_samples: list[Sample]
) -> None:
    """The masks of the tree are built in the model's type; scores agree with float32 to bfloat16's precision."""
    half = copy.deepcopy(tiny_model).bfloat16()
    some = tiny_samples[:4]
    tokens_BWL, logps_BWL = draw(half, trie, some, Sampling(16))
    assert logps_BWL.dtype == np.float32
    for sample, tokens_WL, logps_WL in zip(some, tokens_BWL, logps_BWL, strict=True):
        expected = oracle.token_logps(tiny_model, sample.prompt_ids, tokens_WL, paths)
        assert np.abs(logps_WL - expected).mean() < 0.1
    leaves_BW, _ = beam(half, trie, [sample.prompt_ids for sample in some], 500)
    assert (np.sort(leaves_BW, axis=1) == np.arange(len(paths)) + trie.trie.level_start[-2]).all()


# --- the distribution


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_are_the_exact_probabilities(
    tiny_model: Qwen3ForCausalLM,
    trie: TorchTrie,
    paths: list[oracle.Path_],
    tiny_samples: list[Sample],
    temperature: float,
) -> None:
    """Chi-square over all items: 16 samples of one prompt under different names, 256 draws each."""
    sample = tiny_samples[5]
    named = [replace(sample, record=replace(sample.record, source=f"copy:{copy_}", user="")) for copy_ in range(16)]
    tokens_BWL, _ = draw(tiny_model, trie, named, Sampling(256, temperature=temperature, seed=1))
    place = {path: index for index, path in enumerate(paths)}
    drawn = [place[tuple(tokens)] for tokens in tokens_BWL.reshape(-1, 3).tolist()]
    counts = np.bincount(drawn, minlength=len(paths))
    probabilities = np.exp(
        oracle.token_logps(tiny_model, sample.prompt_ids, np.array(paths), paths, temperature).sum(1)
    )
    expected = probabilities * len(drawn)
    rare = expected < 5  # pooled into one bin, as the test asks
    observed_bins = np.append(counts[~rare], counts[rare].sum())
    expected_bins = np.append(expected[~rare], expected[rare].sum())
    free = len(observed_bins) - 1
    assert free > 15
    chi_square = ((observed_bins - expected_bins) ** 2 / expected_bins).sum()
    # Wilson-Hilferty: the quantile of chi-square at 4 standard deviations (p = 3e-5).
    assert chi_square < free * (1 - 2 / (9 * free) + 4 * np.sqrt(2 / (9 * free))) ** 3


def test_draws_of_one_group_are_independent(
    tiny_model: Qwen3ForCausalLM, trie: TorchTrie, tiny_samples: list[Sample], exact: list[np.ndarray]
) -> None:
    """Two draws of a group agree as often as two independent ones would: sum of p²."""
    tokens_BWL, _ = draw(tiny_model, trie, tiny_samples, Sampling(64, seed=2))
    same = (tokens_BWL[:, :, None] == tokens_BWL[:, None]).all(axis=-1)
    agree = (same.sum(axis=(1, 2)) - 64) / (64 * 63)
    expected = np.array([np.exp(2 * logps_SL.sum(axis=1)).sum() for logps_SL in exact])
    assert np.abs(agree - expected).mean() < 0.05
    assert agree.mean() == pytest.approx(expected.mean(), abs=0.02)


# --- batches, order, seeds


def test_a_sample_gives_the_same_in_any_batch(
    tiny_model: Qwen3ForCausalLM, trie: TorchTrie, tiny_samples: list[Sample]
) -> None:
    """Alone, in the whole batch (left padding), in another order."""
    sampling = Sampling(6, seed=9)
    tokens_BWL, logps_BWL = draw(tiny_model, trie, tiny_samples, sampling)
    order = np.random.default_rng(0).permutation(len(tiny_samples))[:7]
    shuffled, _ = draw(tiny_model, trie, [tiny_samples[row] for row in order], sampling)
    np.testing.assert_array_equal(shuffled, tokens_BWL[order])
    for row in (0, 1, 9, 21):  # row 0 is the shortest prompt, 21 the longest
        alone, alone_logps = draw(tiny_model, trie, [tiny_samples[row]], sampling)
        np.testing.assert_array_equal(alone[0], tokens_BWL[row])
        np.testing.assert_allclose(alone_logps[0], logps_BWL[row], atol=2e-5)


def test_a_wider_group_begins_with_the_narrow_one(
    tiny_model: Qwen3ForCausalLM, trie: TorchTrie, tiny_samples: list[Sample]
) -> None:
    wide, _ = draw(tiny_model, trie, tiny_samples[:4], Sampling(8, seed=4))
    narrow, _ = draw(tiny_model, trie, tiny_samples[:4], Sampling(3, seed=4))
    np.testing.assert_array_equal(wide[:, :3], narrow)


def test_engine_keeps_order_through_batches(hf_engine: HFEngine, tiny_samples: list[Sample]) -> None:
    sampling = Sampling(4, seed=5)
    groups = hf_engine.generate(tiny_samples, sampling)
    assert [group.sample for group in groups] == tiny_samples
    backwards = hf_engine.generate(tiny_samples[::-1], sampling)
    assert written(backwards)[::-1] == written(groups)
    hf_engine.max_batch_prompts = 64
    assert written(hf_engine.generate(tiny_samples, sampling)) == written(groups)
    assert hf_engine.generate([], sampling) == []


def test_seeds(hf_engine: HFEngine, tiny_samples: list[Sample]) -> None:
    first = hf_engine.generate(tiny_samples, Sampling(4, seed=5))
    assert hf_engine.generate(tiny_samples, Sampling(4, seed=5)) == first
    other = hf_engine.generate(tiny_samples, Sampling(4, seed=6))
    assert sum(a != b for a, b in zip(written(first), written(other), strict=True)) > len(tiny_samples) // 2
    # Samples of one prompt draw on their own: only the name differs.
    twin = replace(tiny_samples[5], record=replace(tiny_samples[5].record, source="twin"))
    one, two = hf_engine.generate([tiny_samples[5], twin], Sampling(16))
    assert written([one]) != written([two])
    seeds = {sample_seed(seed, sample) for seed in range(20) for sample in tiny_samples}
    assert len(seeds) == 20 * len(tiny_samples) and all(0 <= seed < 2**63 for seed in seeds)


def test_engine_leaves_the_model_as_it_was(hf_engine: HFEngine, tiny_samples: list[Sample]) -> None:
    """A trainer's model stays in training mode and unchanged; its dropout is off while it generates."""
    expected = hf_engine.generate(tiny_samples[:3], Sampling(2))
    for layer in hf_engine.model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    hf_engine.model.train()
    before = {name: tensor.clone() for name, tensor in hf_engine.model.state_dict().items()}
    assert hf_engine.generate(tiny_samples[:3], Sampling(2)) == expected
    hf_engine.generate(tiny_samples[:3], Sampling(2, "beam"))
    assert hf_engine.model.training
    for name, tensor in hf_engine.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# --- beams


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_wide_beam_is_the_exact_ranking(
    tiny_model: Qwen3ForCausalLM,
    trie: TorchTrie,
    paths: list[oracle.Path_],
    tiny_samples: list[Sample],
    temperature: float,
) -> None:
    """Width beyond the number of items: every item once, best first, no junk."""
    some = tiny_samples[:6]
    leaves_BW, logps_BWL = beam(tiny_model, trie, [sample.prompt_ids for sample in some], 500, temperature)
    first_leaf = trie.trie.level_start[-2]
    assert leaves_BW.shape == (len(some), len(paths)) and logps_BWL.shape == (*leaves_BW.shape, 3)
    for sample, leaves, logps_WL in zip(some, leaves_BW, logps_BWL, strict=True):
        expected = oracle.token_logps(tiny_model, sample.prompt_ids, np.array(paths), paths, temperature)
        assert sorted(leaves - first_leaf) == list(range(len(paths)))
        np.testing.assert_allclose(logps_WL, expected[leaves - first_leaf], atol=2e-5)
        assert (np.diff(logps_WL.sum(axis=1)) <= 1e-5).all()


@pytest.mark.parametrize("width", [1, 2, 7, 30])
def test_narrow_beams(
    tiny_model: Qwen3ForCausalLM,
    trie: TorchTrie,
    paths: list[oracle.Path_],
    tiny_samples: list[Sample],
    exact: list[np.ndarray],
    width: int,
) -> None:
    """The items a brute-force beam of this width finds, in its order, with their exact log-probabilities."""
    leaves_BW, logps_BWL = beam(tiny_model, trie, [sample.prompt_ids for sample in tiny_samples], width)
    for logps_SL, leaves, logps_WL in zip(exact, leaves_BW, logps_BWL, strict=True):
        found = (leaves - trie.trie.level_start[-2]).tolist()
        assert found == oracle.beams(logps_SL, paths, width)
        assert len(set(found)) == width
        np.testing.assert_allclose(logps_WL, logps_SL[found], atol=2e-5)


def test_a_beam_of_one_is_greedy(hf_engine: HFEngine, tiny_samples: list[Sample]) -> None:
    beams = hf_engine.generate(tiny_samples, Sampling(1, "beam"))
    assert written(beams) == written(hf_engine.generate(tiny_samples, Sampling(1, "greedy")))


def test_beams_do_not_depend_on_the_batch(
    tiny_model: Qwen3ForCausalLM, trie: TorchTrie, tiny_samples: list[Sample]
) -> None:
    prompts = [sample.prompt_ids for sample in tiny_samples]
    together, _ = beam(tiny_model, trie, prompts, 12)
    for row in (0, 9, 21):
        np.testing.assert_array_equal(beam(tiny_model, trie, [prompts[row]], 12)[0][0], together[row])


def test_engine_lists_all_items_when_there_are_few(
    tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder, tiny_samples: list[Sample]
) -> None:
    """A catalogue of five items under a beam of eight: groups of five, all distinct, sid indices of the whole one."""
    few = subset(tiny_decoder, [3, 40, 41, 90, 150])
    for group in HFEngine(tiny_model, few).generate(tiny_samples[:5], Sampling(8, "beam")):
        assert sorted(rollout.sids for rollout in group.rollouts) == [(3,), (40,), (41,), (90,), (150,)]
        assert group.ranking() == [rollout.sids[0] for rollout in group.rollouts]


# --- small catalogues


def test_one_item(tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder, tiny_samples: list[Sample]) -> None:
    """It is certain: log-probability 0 whatever the model thinks."""
    one = HFEngine(tiny_model, subset(tiny_decoder, [17]))
    path = tuple(tiny_decoder.paths[17].tolist())
    for sampling in (Sampling(3), Sampling(3, "greedy"), Sampling(3, "beam"), Sampling(3, temperature=0.01)):
        for group in one.generate(tiny_samples[:4], sampling):
            assert len(group) == (1 if sampling.sampler == "beam" else 3)
            for rollout in group.rollouts:
                assert rollout.token_ids == path and rollout.sids == (17,)
                assert rollout.logps_sampler == (0.0, 0.0, 0.0)


def test_one_level(tiny_model: Qwen3ForCausalLM, tiny_vocab: SidVocab, tiny_samples: list[Sample]) -> None:
    """Items of a single token: the root's softmax is the whole story."""
    tokens = tiny_vocab.level_ids[0][[1, 4, 9, 15]]
    catalog = Catalog.build(letters_format((4,)), list("abcd"), np.arange(4)[:, None])
    decoder = Decoder(catalog, SidTrie.from_paths(tokens[:, None], tiny_model.config.vocab_size))
    engine = HFEngine(tiny_model, decoder)
    draws = engine.generate(tiny_samples[:5], Sampling(200))
    beams = engine.generate(tiny_samples[:5], Sampling(9, "beam"))
    for sample, drawn, listed in zip(tiny_samples[:5], draws, beams, strict=True):
        with torch.no_grad():
            logits = tiny_model(input_ids=torch.tensor([sample.prompt_ids])).logits[0, -1]
        logps = logits[tokens.tolist()].log_softmax(-1).numpy()
        assert [rollout.sids[0] for rollout in listed.rollouts] == np.argsort(-logps).tolist()
        np.testing.assert_allclose([rollout.logp for rollout in listed.rollouts], np.sort(logps)[::-1], atol=2e-5)
        counts = np.bincount([rollout.sids[0] for rollout in drawn.rollouts], minlength=4)
        assert np.abs(counts / 200 - np.exp(logps)).sum() / 2 < 0.1  # total variation


# --- the tree decoder


def test_branches_see_their_own_ancestors_only(tiny_model: Qwen3ForCausalLM, tiny_samples: list[Sample]) -> None:
    """Branches that split, cross and die out: each one's logits are those of its own text."""
    prompts = [tiny_samples[row].prompt_ids for row in (0, 21, 4)]
    tree = TreeDecoder(tiny_model, prompts)
    tree.prefill()
    rng = np.random.default_rng(0)
    texts: list[list[list[int]]] = [[[*prompt]] for prompt in prompts]
    for width in (3, 5, 2, 4):
        tokens = rng.integers(5, 300, (len(prompts), width))
        parents = rng.integers(0, len(texts[0]), (len(prompts), width))
        texts = [
            [[*texts[row][parent], int(token)] for parent, token in zip(parents[row], tokens[row], strict=True)]
            for row in range(len(prompts))
        ]
        with torch.no_grad():
            logits_BWV = tree.logits(tree.extend(torch.from_numpy(tokens), torch.from_numpy(parents)))
            for row, branches in enumerate(texts):
                expected = tiny_model(input_ids=torch.tensor(branches)).logits[:, -1]
                torch.testing.assert_close(logits_BWV[row], expected, atol=5e-5, rtol=1e-4)
