"""Hand-computed numbers for every built-in reward."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from configs.schema import RewardConfig
from rewards.protocol import RewardError, ScoredGroup
from rewards.runner import RewardSet
from rollout.catalog import Catalog
from rollout.types import RolloutGroup

MakeGroup = Callable[..., RolloutGroup]
D2, D3, D4 = 1 / math.log2(3), 1 / 2, 1 / math.log2(5)  # discounts of ranks 2, 3, 4


def scored(catalog: Catalog, group: RolloutGroup, reward: str, **params: object) -> ScoredGroup:
    return RewardSet([RewardConfig(reward, name="r", params=params)], catalog).score([group])[0]


def values(catalog: Catalog, group: RolloutGroup, reward: str, **params: object) -> list[float]:
    return list(scored(catalog, group, reward, **params).total)


# --- ndcg


def test_ndcg_credits_each_rollout_with_its_place(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([0, 1, 2, 1, None], targets=[1, 7])  # ranking 0 1 2, and sid 1 was written twice
    ideal = 1 + D2
    result = scored(catalog, group, "ndcg@10")
    assert result.rewards["r"] == pytest.approx((0, D2 / ideal, 0, D2 / ideal, 0))
    assert result.parts["r/list"] == pytest.approx((D2 / ideal,) * 5)
    assert values(catalog, group, "ndcg@1") == [0, 0, 0, 0, 0]
    assert values(catalog, group, "ndcg@2", illegal=-1.0) == pytest.approx([0, D2 / ideal, 0, D2 / ideal, -1])


def test_ndcg_follows_likelihood_not_the_order_of_rollouts(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([0, 1, 2], targets=[2], logps=[-3.0, -2.0, -1.0])
    assert values(catalog, group, "ndcg@1") == [0, 0, 1]


def test_ndcg_gains_and_ideal(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([0, 1, 2], targets=[1, 0, 6], gains=[3.0, 1.0, 2.0])
    assert values(catalog, group, "ndcg@2") == pytest.approx([1 / (3 + 2 * D2), 3 * D2 / (3 + 2 * D2), 0])
    # Without @k: k = G = 3, so all three gains are in the ideal.
    assert values(catalog, group, "ndcg")[0] == pytest.approx(1 / (3 + 2 * D2 + 1 * D3))
    assert values(catalog, group, "ndcg", k=2) == values(catalog, group, "ndcg@2")


def test_ndcg_of_a_shared_sid_is_expected(catalog: Catalog, make_group: MakeGroup) -> None:
    assert values(catalog, make_group([4], targets=[5]), "ndcg@10") == [0.5]
    both = make_group([4], targets=[4, 5], gains=[3.0, 1.0])
    assert values(catalog, both, "ndcg@1") == pytest.approx([2 / 3])


def test_marginal_ndcg_charges_misses_above_a_hit(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([0, 1, 2, None], targets=[1])
    result = scored(catalog, group, "ndcg@3", credit="marginal")
    assert result.total == pytest.approx((D2 - 1, D2, 0, 0))
    assert result.parts["r/list"] == pytest.approx((D2,) * 4)
    # A hit at k + 1 moves into the list when one above it goes.
    assert values(catalog, group, "ndcg@1", credit="marginal") == pytest.approx([-1, 0, 0, 0])


def test_slate_gets_the_metric_of_its_own_list(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([(0, 1), (1, 0, 1), (2,), None], targets=[1, 2])
    ideal = 1 + D2
    assert values(catalog, group, "ndcg@2", illegal=-1) == pytest.approx([D2 / ideal, 1 / ideal, 1 / ideal, -1])
    assert scored(catalog, group, "ndcg@2", illegal=-1).parts["r/list"][3] == 0
    assert values(catalog, group, "recall@1") == [0, 0.5, 0.5, 0]
    assert values(catalog, group, "hit@2") == [1, 1, 1, 0]
    assert values(catalog, group, "mrr") == [0.5, 1, 1, 0]


# --- recall, hit, mrr


def test_recall(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([1, 4, 2, None], targets=[1, 5, 2, 7], gains=[9.0, 1.0, 1.0, 1.0])
    result = scored(catalog, group, "recall@2", illegal=-1)
    assert list(result.total) == [0.25, 0.125, 0, -1]
    assert list(result.parts["r/list"]) == [0.375] * 4
    assert values(catalog, group, "recall") == [0.25, 0.125, 0.25, 0]


def test_hit(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([4, 0, 1, 4, None], targets=[5, 1])
    result = scored(catalog, group, "hit", illegal=-2)
    assert list(result.total) == [0.5, 0, 1, 0.5, -2]
    assert list(result.parts["r/list"]) == [1] * 5
    assert list(scored(catalog, group, "hit@2").total) == [0.5, 0, 0, 0.5, 0]
    assert list(scored(catalog, group, "hit@2").parts["r/list"]) == [0.5] * 5


def test_mrr_pays_the_first_hit(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([0, 1, 2, 1, None], targets=[1, 2])
    result = scored(catalog, group, "mrr", illegal=-1)
    assert list(result.total) == [0, 0.5, 0, 0.5, -1]
    assert list(result.parts["r/list"]) == [0.5] * 5
    assert values(catalog, group, "mrr@1") == [0] * 5


def test_mrr_of_a_shared_sid_is_expected(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([4, 1], targets=[5, 1])  # first hit: sid 4 with 1/2 at rank 1, else sid 1 at rank 2
    result = scored(catalog, group, "mrr")
    assert list(result.total) == [0.5, 0.25]
    assert list(result.parts["r/list"]) == [0.75, 0.75]


# --- rank_penalty, prefix


def test_rank_penalty_is_minionerecs(catalog: Catalog, make_group: MakeGroup) -> None:
    total = 1 + D2 + D3 + D4
    group = make_group([3, 1, 0, None], targets=[1], logps=[-2.0, -1.5, -1.0, -9.0])  # positions 2, 1, 0, 3
    result = scored(catalog, group, "rank_penalty")
    assert result.total == pytest.approx((-D3 / total, 1, -1 / total, -D4 / total))
    assert list(result.parts["r/match"]) == [0, 1, 0, 0]
    assert result.parts["r/penalty"] == pytest.approx((-D3 / total, 0, -1 / total, -D4 / total))
    assert values(catalog, group, "rank_penalty", illegal=-1)[3] == -1
    assert values(catalog, make_group([0, 2, None], targets=[1]), "rank_penalty") == [0, 0, 0]
    assert values(catalog, make_group([4, 0], targets=[5]), "rank_penalty") == pytest.approx([0.5, -D2 / (1 + D2)])


def test_prefix(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([0, 1, 2, 3, None], targets=[0])
    assert values(catalog, group, "prefix", illegal=-0.5) == [1, 0.707, 0.5, 0, -0.5]
    assert values(catalog, group, "prefix", credits=[0.3]) == [1, 0.3, 0.3, 0, 0]
    assert values(catalog, make_group([1, 4], targets=[3, 2]), "prefix") == [0.5, 0.5]  # best of two targets
    assert values(catalog, make_group([4], targets=[5]), "prefix") == [1]  # the sid is right, whoever shares it
    assert values(catalog, make_group([(0, 3)], targets=[0]), "prefix") == [0.5]


# --- overlong


def test_overlong_counts_free_text_alone(catalog: Catalog, make_group: MakeGroup) -> None:
    plain = make_group([0, None, 1], targets=[0])
    texts = (0, 6, 7, 9, 10, 40)
    rollouts = tuple(
        dataclasses.replace(
            plain.rollouts[0],
            token_ids=(9,) * text + (1, 2, 3),
            logps_sampler=(-1.0,) * (text + 3),
            on_trie=(False,) * text + (True,) * 3,
        )
        for text in texts
    )
    group = dataclasses.replace(plain, rollouts=rollouts)
    expected = [0, 0, -0.25, -0.75, -1, -1]
    assert values(catalog, group, "overlong", max_tokens=10, buffer=4) == pytest.approx(expected)
    assert values(catalog, plain, "overlong", max_tokens=10, buffer=10) == [0, 0, 0]
    for buffer in (0, 11):
        with pytest.raises(RewardError, match=f"buffer={buffer} must be above 0 and at most max_tokens=10"):
            RewardSet([RewardConfig("overlong", params={"max_tokens": 10, "buffer": buffer})], catalog)


# --- validity, diversity, popularity


def test_validity(catalog: Catalog, make_group: MakeGroup) -> None:
    assert values(catalog, make_group([0, None], targets=[0]), "validity") == [1, 0]
    assert values(catalog, make_group([(0, 1), None], targets=[0]), "validity", illegal=-1.0) == [1, -1]


def test_diversity_of_items(catalog: Catalog, make_group: MakeGroup) -> None:
    result = scored(catalog, make_group([0, 1, 0, None], targets=[0]), "diversity", illegal=-1)
    assert list(result.total) == [0.5, 1, 0.5, -1]
    assert result.parts["r/list"] == pytest.approx((2 / 3,) * 4)
    assert values(catalog, make_group([(0, 1), (2, 2)], targets=[0]), "diversity") == [1, 0.5]


def test_diversity_of_prefixes_and_categories(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([0, 1, 2, 3], targets=[0])  # first levels 0 0 0 1, first two 00 00 01 10, categories a a a b
    common, rare = math.log(4 / 3) / math.log(4), 1.0
    assert values(catalog, group, "diversity", of="prefix") == pytest.approx([common, common, common, rare])
    assert values(catalog, group, "diversity", of="prefix", levels=2) == pytest.approx([0.5, 0.5, 1, 1])
    assert values(catalog, group, "diversity", of="category") == pytest.approx([common, common, common, rare])
    illegal = make_group([0, 3, None, None], targets=[0])  # two legal ones share log(G) of four
    assert values(catalog, illegal, "diversity", of="prefix") == [0.5, 0.5, 0, 0]
    shared = make_group([3, 4], targets=[0])  # sid 4 holds a b and a c: b comes first
    assert values(catalog, shared, "diversity", of="category") == [0, 0]


def test_diversity_by_distance(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([0, 1, 2, 3], targets=[0])  # unit vectors x, x, y, -x
    assert values(catalog, group, "diversity", of="distance") == pytest.approx([0.5, 0.5, 0.5, 5 / 6])
    # Sid 4 is y or x with equal chance: half the distance to x, and half of .5 to another draw of itself.
    assert values(catalog, make_group([0, 4], targets=[0]), "diversity", of="distance") == pytest.approx([0.25, 0.25])
    assert values(catalog, make_group([4, 4], targets=[0]), "diversity", of="distance") == pytest.approx([0.25, 0.25])
    zero = make_group([5, 0, None], targets=[0])  # item 6 has a zero embedding
    assert values(catalog, zero, "diversity", of="distance") == [0.5, 0.5, 0]


@pytest.mark.parametrize(("of", "alone"), [("item", 1), ("prefix", 0), ("category", 0), ("distance", 0)])
def test_diversity_of_one(catalog: Catalog, make_group: MakeGroup, of: str, alone: float) -> None:
    assert values(catalog, make_group([0], targets=[0]), "diversity", of=of) == [alone]
    assert values(catalog, make_group([None, None], targets=[0]), "diversity", of=of) == [0, 0]


def test_popularity(catalog: Catalog, make_group: MakeGroup) -> None:
    group = make_group([0, 1, 2, 3, 4, None], targets=[0])  # log2(1 + pop) = 0 1 2 3 and (0, 4); the maximum is 4
    assert values(catalog, group, "popularity", illegal=-1) == pytest.approx([1, 0.75, 0.5, 0.25, 0.5, -1])
    assert values(catalog, make_group([(0, 2)], targets=[0]), "popularity") == pytest.approx([0.75])


# --- what the catalogue or the params do not allow is said at build time


@pytest.mark.parametrize(
    ("reward", "params", "lacks", "message"),
    [
        ("diversity", {"of": "distance"}, {"embeddings_ND": None}, "of='distance' needs item embeddings"),
        ("diversity", {"of": "category"}, {"categories": ("",) * 8}, "of='category' needs item categories"),
        ("diversity", {"of": "prefix", "levels": 4}, {}, "levels=4 is more than the 3 levels"),
        ("diversity", {"of": "prefix", "levels": 0}, {}, "levels=0 must be a whole number"),
        ("diversity", {"of": "colour"}, {}, "of='colour' must be item, prefix, category or distance"),
        ("popularity", {}, {"popularity_N": np.zeros(8)}, "it needs interaction counts, and the catalogue's"),
        ("ndcg", {"credit": "half"}, {}, "credit='half' must be gain or marginal"),
        ("ndcg", {"k": 0}, {}, "k=0 must be a whole number"),
        ("hit", {"k": 2.5}, {}, "k=2.5 must be a whole number"),
        ("prefix", {"credits": []}, {}, r"credits=\[\] must be a list"),
        ("prefix", {"credits": "abc"}, {}, "credits='abc' must be a list"),
        ("validity", {"illegal": math.inf}, {}, "returned inf .* for rollout 2 of 3, must be a finite number"),
    ],
)
def test_impossible_settings_fail_at_build(
    catalog: Catalog, reward: str, params: dict[str, object], lacks: dict[str, object], message: str
) -> None:
    poorer = dataclasses.replace(catalog, **lacks)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match=f"reward '{reward}'.*: {message}"):
        RewardSet([RewardConfig(reward, params=params)], poorer)
