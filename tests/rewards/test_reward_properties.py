"""What holds for every group: sums, bounds, order, brute-force oracles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import RewardConfig
from rewards.protocol import ScoredGroup
from rewards.runner import RewardSet
from rl.metrics import evaluate_lists
from rollout.catalog import Catalog
from rollout.sid import letters_format
from rollout.types import Record, Rollout, RolloutGroup, Sample

CODES = [(a, b) for a in range(3) for b in range(3)]
# Twelve items on nine sids: sid 0 holds items 0, 9, 10 and sid 4 items 4, 11.
SHARED = Catalog.build(
    letters_format((3, 3)),
    [str(i) for i in range(12)],
    np.array([*CODES, CODES[0], CODES[0], CODES[4]]),
    categories=list("abcabcabcabc"),
    popularity_N=np.arange(12),
    embeddings_ND=np.random.default_rng(0).normal(size=(12, 4)),
)
NAMES = ("ndcg", "ndcg@3", "recall@2", "hit@3", "mrr", "rank_penalty", "prefix", "validity", "diversity", "popularity")
ALL = RewardSet(
    [
        *[RewardConfig(name) for name in NAMES],
        RewardConfig("ndcg@3", name="marginal", params={"credit": "marginal"}),
        *[RewardConfig("diversity", name=f"by_{of}", params={"of": of}) for of in ("prefix", "category", "distance")],
    ],
    SHARED,
)


@st.composite
def groups(draw: st.DrawFn) -> RolloutGroup:
    written = draw(st.lists(st.one_of(st.none(), st.integers(0, 8)), min_size=1, max_size=8))
    places = draw(st.permutations(range(len(written))))
    targets = draw(st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True))
    gains = draw(st.lists(st.floats(0.1, 5), min_size=len(targets), max_size=len(targets)))
    sample = Sample(Record("x:1", "", (), tuple(targets), tuple(gains)), (1,))
    rollouts = [
        Rollout((1,), (-float(place),), (True,), (), (), 0, "illegal")
        if sid is None
        else Rollout((1,), (-float(place),), (True,), (sid,), (SHARED.items_of_sid(sid),), 0, "item")
        for sid, place in zip(written, places, strict=True)
    ]
    return RolloutGroup(sample, tuple(rollouts))


def score(group: RolloutGroup) -> ScoredGroup:
    return ALL.score([group])[0]


def by_sid(group: RolloutGroup, values: tuple[float, ...]) -> dict[int, float]:
    """Value of each distinct sid; duplicates must agree."""
    found: dict[int, float] = {}
    for rollout, value in zip(group.rollouts, values, strict=True):
        for sid in rollout.sids:
            assert found.setdefault(sid, value) == value
    return found


def expected_over_draws(group: RolloutGroup, ranking: list[int], metric: Callable[[list[float]], float]) -> float:
    """Brute force: fill each place with each item of its sid in turn, and average the metric of the gains."""
    gain_of = dict(zip(group.sample.targets, group.sample.gains, strict=True))
    draws = list(itertools.product(*[SHARED.items_of_sid(sid) for sid in ranking]))
    return sum(metric([gain_of.get(item, 0.0) for item in draw]) for draw in draws) / len(draws)


def ndcg(gains: list[float], all_gains: tuple[float, ...], k: int) -> float:
    def dcg(ordered: list[float]) -> float:
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(ordered[:k], start=1))

    return dcg(gains) / dcg(sorted(all_gains, reverse=True))


@given(groups())
def test_credits_sum_to_the_expected_metric_of_the_list(group: RolloutGroup) -> None:
    ranking, gains, size = group.ranking(), group.sample.gains, len(group)
    oracles: dict[str, Callable[[list[float]], float]] = {
        "ndcg": lambda drawn: ndcg(drawn, gains, size),
        "ndcg@3": lambda drawn: ndcg(drawn, gains, 3),
        "recall@2": lambda drawn: sum(gain > 0 for gain in drawn[:2]) / len(gains),
        "mrr": lambda drawn: next((1 / rank for rank, gain in enumerate(drawn, 1) if gain > 0), 0.0),
    }
    result = score(group)
    for name, metric in oracles.items():
        expected = expected_over_draws(group, ranking, metric)
        assert sum(by_sid(group, result.rewards[name]).values()) == pytest.approx(expected)
        assert result.parts[f"{name}/list"] == pytest.approx([expected] * size)
    hit = expected_over_draws(group, ranking, lambda drawn: float(any(drawn[:3])))
    assert result.parts["hit@3/list"] == pytest.approx([hit] * size)


@given(groups())
def test_marginal_credit_is_the_difference_that_the_sid_makes(group: RolloutGroup) -> None:
    gains, ranking = group.sample.gains, group.ranking()

    def value(sids: list[int]) -> float:
        return expected_over_draws(group, sids, lambda drawn: ndcg(drawn, gains, 3))

    for sid, credit in by_sid(group, score(group).rewards["marginal"]).items():
        assert credit == pytest.approx(value(ranking) - value([s for s in ranking if s != sid]), abs=1e-9)


@given(groups())
def test_bounds(group: RolloutGroup) -> None:
    result = score(group)
    for name, values in result.rewards.items():
        low = -1 if name in ("marginal", "rank_penalty") else 0
        assert all(low <= value <= 1 + 1e-9 for value in values), name
        if name != "rank_penalty":
            assert all(value == 0 for value, r in zip(values, group.rollouts, strict=True) if not r.legal), name
    assert sum(result.rewards["diversity"]) == pytest.approx(len(group.ranking()))
    assert -1 - 1e-9 <= sum(result.parts["rank_penalty/penalty"]) <= 0


@given(groups())
def test_entropy_is_the_mean_of_the_prefix_values(group: RolloutGroup) -> None:
    buckets = [SHARED.sids_SL[rollout.sids[0], 0] for rollout in group.rollouts if rollout.legal]
    if len(group) > 1 and buckets:
        shares = np.unique(buckets, return_counts=True)[1] / len(buckets)
        entropy = float(-(shares * np.log(shares)).sum() / math.log(len(group)))
        assert score(group).parts["by_prefix/list"] == pytest.approx([entropy] * len(group), abs=1e-12)


@given(groups(), st.randoms(use_true_random=False))
def test_reordering_rollouts_reorders_values(group: RolloutGroup, random: object) -> None:
    order = list(range(len(group)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = RolloutGroup(group.sample, tuple(group.rollouts[i] for i in order))
    before, after = score(group), score(shuffled)
    for name, values in before.rewards.items():
        assert after.rewards[name] == pytest.approx([values[i] for i in order]), name


@given(st.permutations(range(9)), st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True))
def test_without_collisions_the_list_parts_are_the_evaluation_metrics(ranking: list[int], targets: list[int]) -> None:
    catalog = Catalog.build(letters_format((3, 3)), [str(i) for i in range(9)], np.array(CODES))
    sample = Sample(Record("x:1", "", (), tuple(targets), (1.0,) * len(targets)), (1,))
    rollouts = [Rollout((1,), (-float(i),), (True,), (s,), ((s,),), 0, "item") for i, s in enumerate(ranking)]
    names = {"ndcg@5": "ndcg@5", "hit@3": "hr@3", "mrr": "mrr"}
    rewards = RewardSet([RewardConfig(name) for name in names], catalog)
    parts = rewards.score([RolloutGroup(sample, tuple(rollouts))])[0].parts
    evaluated = evaluate_lists([ranking], [targets], None, catalog, bootstrap=0, seed=0).values
    for reward, metric in names.items():
        assert parts[f"{reward}/list"][0] == pytest.approx(evaluated[metric])
