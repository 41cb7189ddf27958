"""Restricted requests, slates, top-p and a changed catalogue in both engines, against brute force on the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from transformers import Qwen3ForCausalLM

from rollout.decode import Decoder
from rollout.types import Engine, Rollout, Sample, Sampling
from tests import oracle
from tests.rollout.conftest import BOTH


def allowed_paths(decoder: Decoder, sample: Sample) -> list[oracle.Path_]:
    """Paths of the Sids of which some item may be recommended."""
    sids = {int(decoder.catalog.sid_index_N[i]) for i in range(len(decoder.catalog)) if sample.record.allows(i)}
    return [decoder.path_of(sid) for sid in sorted(sids)]


@pytest.fixture(scope="module")
def restricted(tiny_samples: list[Sample], tiny_decoder: Decoder) -> list[Sample]:
    """Samples with candidates, with items excluded, with both, with one candidate, and free ones."""
    rng, catalog = np.random.default_rng(3), tiny_decoder.catalog
    shared = next(tuple(catalog.items_of_sid(s)) for s in range(len(catalog.sids_SL)) if catalog.cluster_sizes_S[s] > 1)
    samples = []
    for row, sample in enumerate(tiny_samples[:10]):
        candidates = tuple(rng.choice(len(catalog), 30, replace=False).tolist())
        excluded = tuple(rng.choice(len(catalog), 60, replace=False).tolist())
        more = [
            {},
            {"candidates": candidates},
            {"excluded": excluded},
            {"candidates": candidates, "excluded": (*candidates[:12], *excluded)},
            {"candidates": candidates[:1]},
            {"excluded": shared},
            {"candidates": (*candidates, shared[0])},
            {"excluded": shared[:1]},
        ][row % 8]
        samples.append(replace(sample, record=replace(sample.record, **more)))  # type: ignore[arg-type]
    return samples


SAMPLINGS = [
    Sampling(40, seed=1),
    Sampling(40, temperature=1.6, seed=1),
    Sampling(3, "greedy"),
    Sampling(12, "unique", temperature=1.3, seed=1),
    Sampling(7, "beam"),
]


@BOTH
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.sampler}-{s.temperature}")
def test_restricted_requests(
    engine: Engine,
    sampling: Sampling,
    restricted: list[Sample],
    tiny_model: Qwen3ForCausalLM,
    tiny_decoder: Decoder,
) -> None:
    """Only allowed items, their clusters cut to what is allowed, log-probabilities over what is left."""
    for sample, group in zip(restricted, engine.generate(restricted, sampling), strict=True):
        paths = allowed_paths(tiny_decoder, sample)
        assert group.sample is sample or group.sample == sample
        tokens = np.array([rollout.token_ids for rollout in group.rollouts])
        assert {tuple(row) for row in tokens.tolist()} <= set(paths)
        for rollout in group.rollouts:
            everyone = tiny_decoder.catalog.items_of_sid(rollout.sids[0])
            assert rollout.items == (tuple(item for item in everyone if sample.record.allows(item)),)
        expected = oracle.token_logps(tiny_model, sample.prompt_ids, tokens, paths, sampling.temperature)
        np.testing.assert_allclose([r.logps_sampler for r in group.rollouts], expected, atol=1e-4)
        if sampling.sampler == "greedy":
            assert tuple(tokens[0].tolist()) == oracle.greedy_path(tiny_model, sample.prompt_ids, paths)
        if sampling.sampler in ("beam", "unique"):
            assert (
                len({rollout.sids for rollout in group.rollouts}) == len(tokens) == min(sampling.group_size, len(paths))
            )
        if sampling.sampler == "beam":
            logps = oracle.token_logps(tiny_model, sample.prompt_ids, np.array(paths), paths)
            found = [paths[index] for index in oracle.beams(logps, paths, sampling.group_size)]
            assert [tuple(row) for row in tokens.tolist()] == found


@BOTH
def test_nothing_left(engine: Engine, tiny_samples: list[Sample], tiny_decoder: Decoder) -> None:
    everything = tuple(range(len(tiny_decoder.catalog)))
    sample = replace(tiny_samples[0], record=replace(tiny_samples[0].record, excluded=everything))
    with pytest.raises(ValueError, match="tiny:0: no item is left that may be recommended"):
        engine.generate([sample], Sampling(2))


def items_of(rollout: Rollout, decoder: Decoder, marks: int) -> list[oracle.Path_]:
    """The paths that a slate is made of; checks its marks."""
    period = 3 + marks
    parts = [rollout.token_ids[start : start + 3] for start in range(0, len(rollout.token_ids), period)]
    between = [rollout.token_ids[start + 3 : start + period] for start in range(0, len(rollout.token_ids) - 3, period)]
    assert between == [decoder.marks] * (len(parts) - 1)
    return parts


@BOTH
@pytest.mark.parametrize("marks", [(), (3, 9)], ids=["bare", "marks"])
@pytest.mark.parametrize("sampler", ["sample", "greedy"])
def test_slates(
    engine: Engine,
    marks: tuple[int, ...],
    sampler: str,
    restricted: list[Sample],
    tiny_model: Qwen3ForCausalLM,
    tiny_decoder: Decoder,
) -> None:
    """Items of a slate are legal and differ; each is scored over what the items before it left; marks are free."""
    decoder, samples = replace(tiny_decoder, marks=marks), [s for s in restricted if s.record.candidates != ()]
    samples = [s for s in samples if len(allowed_paths(tiny_decoder, s)) >= 4]
    sampling = Sampling(5, sampler, items=4, temperature=1.0 if sampler == "greedy" else 0.7, seed=2)  # type: ignore[arg-type]
    engine.serve(decoder)
    try:
        groups = engine.generate(samples, sampling)
    finally:
        engine.serve(tiny_decoder)
    for sample, group in zip(samples, groups, strict=True):
        paths = allowed_paths(decoder, sample)
        for rollout in group.rollouts:
            assert len(rollout.token_ids) == 4 * 3 + 3 * len(marks) and rollout.legal
            written, before = items_of(rollout, decoder, len(marks)), list(sample.prompt_ids)
            assert len(set(written)) == 4 and set(written) <= set(paths)
            assert [decoder.path_of(sid) for sid in rollout.sids] == written
            logps = np.array(rollout.logps_sampler)
            assert (logps[np.array(rollout.forced, dtype=bool)] == 0).all()
            assert rollout.on_trie == tuple(not flag for flag in rollout.forced)
            logps = logps[list(rollout.on_trie)].reshape(4, 3)
            for index, path in enumerate(written):
                left = [one for one in paths if one not in written[:index]]
                expected = oracle.token_logps(tiny_model, before, np.array([path]), left, sampling.temperature)
                np.testing.assert_allclose(logps[index], expected[0], atol=1e-4)
                if sampler == "greedy":
                    assert path == oracle.greedy_path(tiny_model, before, left)
                before += [*path, *marks]


@BOTH
def test_top_p(engine: Engine, tiny_samples: list[Sample], tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder) -> None:
    """Only the nucleus of the legal children is drawn, with its renormalised probabilities, as often as they say."""
    sample, paths, top_p = tiny_samples[4], [tuple(p) for p in tiny_decoder.paths.tolist()], 0.9
    (group,) = engine.generate([sample], Sampling(3000, top_p=top_p, temperature=2.0, seed=4))
    tokens = sorted({path[0] for path in paths})
    first = [(token,) for token in tokens]
    p = np.exp(oracle.token_logps(tiny_model, sample.prompt_ids, np.array(tokens)[:, None], first, 2.0)[:, 0])
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    exact = {tokens[index]: p[index] / p[kept].sum() for index in kept}
    assert 1 < len(exact) < len(tokens)
    drawn = Counter(rollout.token_ids[0] for rollout in group.rollouts)
    assert set(drawn) <= set(exact)
    for rollout in group.rollouts:
        assert rollout.logps_sampler[0] == pytest.approx(np.log(exact[rollout.token_ids[0]]), abs=1e-4)
    assert (
        sum(abs(drawn[token] / 3000 - share) for token, share in exact.items()) / 2 < 0.05
    )  # its expected value is about .025


@BOTH
def test_a_changed_catalogue(
    engine: Engine,
    tiny_samples: list[Sample],
    tiny_model: Qwen3ForCausalLM,
    tiny_decoder: Decoder,
) -> None:
    """Items removed are not written any more, items added are; no restart, and the old one can come back."""
    removed = tiny_decoder.trie.subset(np.arange(0, tiny_decoder.trie.num_leaves, 3))
    smaller = Decoder(tiny_decoder.catalog, removed)
    before = engine.generate(tiny_samples, Sampling(9, "beam"))
    try:
        engine.serve(smaller)
        paths = [tuple(path) for path in removed.paths().tolist()]
        for sample, group in zip(tiny_samples, engine.generate(tiny_samples, Sampling(9, "beam")), strict=True):
            logps = oracle.token_logps(tiny_model, sample.prompt_ids, np.array(paths), paths)
            expected = [paths[index] for index in oracle.beams(logps, paths, 9)]
            assert [rollout.token_ids for rollout in group.rollouts] == expected
        drawn = engine.generate(tiny_samples, Sampling(20, seed=1))
        assert {rollout.token_ids for group in drawn for rollout in group.rollouts} <= set(paths)
    finally:
        engine.serve(tiny_decoder)
    after = engine.generate(tiny_samples, Sampling(9, "beam"))
    assert [[r.sids for r in g.rollouts] for g in after] == [[r.sids for r in g.rollouts] for g in before]
