"""Recommender metrics against hand-computed numbers and against every order that collisions allow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.metrics import CUTOFFS, RECALL_CUTOFF, EvalResult, evaluate_lists, paired_difference
from rollout.catalog import Catalog
from rollout.sid import letters_format

Lists = list[list[int]]


def catalog_of(codes: Sequence[tuple[int, ...]], popularity: list[float] | None = None) -> Catalog:
    sizes = tuple(max(column) + 1 for column in zip(*codes, strict=True))
    return Catalog.build(
        letters_format(sizes),
        [f"item{i}" for i in range(len(codes))],
        np.array(codes),
        popularity_N=None if popularity is None else np.array(popularity, dtype=float),
    )


def evaluate(lists: Lists, targets: Lists, catalog: Catalog, gains: list[list[float]] | None = None) -> EvalResult:
    return evaluate_lists(lists, targets, gains, catalog, bootstrap=0, seed=0)


# Items 0 to 5 and their Sids: (0,0) holds 0; (0,1) holds 1, 2, 3; (1,0) holds 4; (2,0) holds 5. Sid indices 0 to 3.
COLLIDING = catalog_of([(0, 0), (0, 1), (0, 1), (0, 1), (1, 0), (2, 0)], popularity=[5, 0, 1, 1, 9, 3])


# --- hand-computed numbers


def test_no_collision_is_the_textbook() -> None:
    catalog = catalog_of([(i, 0) for i in range(6)])
    values = evaluate([[2, 0, 5, 1]], [[5, 3]], catalog, [[2.0, 1.0]]).values
    for prefix in ("", "sid/"):
        assert [values[f"{prefix}hr@{k}"] for k in (1, 3, 5)] == [0, 1, 1]
        assert values[f"{prefix}recall@32"] == 0.5
        assert values[f"{prefix}mrr"] == pytest.approx(1 / 3)
        assert values[f"{prefix}ndcg@1"] == 0
        assert values[f"{prefix}ndcg@3"] == pytest.approx((2 / 2) / (2 + 1 / math.log2(3)))


def test_one_target_in_a_cluster_of_three() -> None:
    values = evaluate([[0, 1, 2]], [[2]], COLLIDING).values  # one item ahead, then ranks 2, 3, 4 with 1/3 each
    assert values["hr@1"] == 0
    assert values["hr@3"] == pytest.approx(2 / 3)
    assert values["hr@5"] == 1
    assert values["ndcg@3"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 3)
    assert values["ndcg@5"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(4) + 1 / math.log2(5)) / 3)
    assert values["recall@32"] == 1
    assert values["mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert (values["sid/hr@1"], values["sid/hr@3"], values["sid/mrr"]) == (0, 1, 0.5)
    assert values["sid/ndcg@3"] == pytest.approx(1 / math.log2(3))


def test_two_targets_of_one_cluster_straddle_the_cutoff() -> None:
    values = evaluate([[1, 0]], [[1, 3]], COLLIDING).values
    assert values["hr@1"] == pytest.approx(2 / 3)
    assert values["hr@3"] == 1
    assert values["mrr"] == pytest.approx(2 / 3 * 1 + 1 / 3 * 1 / 2)  # P(min = 1) = 2/3, P(min = 2) = 1/3
    assert values["ndcg@1"] == pytest.approx(2 / 3)
    # As Sids there is one target, listed first.
    assert values["sid/hr@1"] == values["sid/ndcg@1"] == values["sid/mrr"] == values["sid/recall@32"] == 1


def test_recall_counts_targets_and_sid_recall_counts_sids() -> None:
    values = evaluate([[1]], [[1, 2, 5]], COLLIDING).values
    assert values["recall@32"] == pytest.approx(2 / 3)
    assert values["sid/recall@32"] == 0.5


def test_recall_at_32_cuts_inside_a_large_cluster() -> None:
    catalog = catalog_of([(0,)] * 40 + [(1,)])
    values = evaluate([[0, 1], [1, 0]], [[7], [7]], catalog).values
    assert values["recall@32"] == pytest.approx((32 / 40 + 31 / 40) / 2)
    assert values["hr@20"] == pytest.approx((20 / 40 + 19 / 40) / 2)


def test_sid_gain_is_the_best_of_its_items() -> None:
    values = evaluate([[1, 2]], [[1, 2, 4]], COLLIDING, [[1.0, 3.0, 2.0]]).values
    assert values["sid/ndcg@3"] == 1  # gains 3 then 2: the ideal order
    swapped = evaluate([[2, 1]], [[1, 2, 4]], COLLIDING, [[1.0, 3.0, 2.0]]).values
    assert swapped["sid/ndcg@3"] == pytest.approx((2 + 3 / math.log2(3)) / (3 + 2 / math.log2(3)))
    assert swapped["sid/ndcg@1"] == pytest.approx(2 / 3)


def test_mean_over_users_and_order_of_per_user() -> None:
    result = evaluate([[0], [2], [0, 2]], [[0], [0], [4]], COLLIDING)
    assert result.rows == 3
    assert result.per_user["hr@1"].tolist() == [1, 0, 0]
    assert result.per_user["mrr"].tolist() == [1, 0, 0.5]
    assert result.values["mrr"] == pytest.approx(0.5)


def test_list_quality() -> None:
    result = evaluate([[0, 1, 2], [1], []], [[0], [0], [0]], COLLIDING)
    assert result.values["coverage@10"] == result.values["coverage@50"] == 3 / 4
    assert result.per_user["diversity@10"].tolist() == [2 / 3, 1, 0]  # first codes 0, 0, 1 | 0 | nothing listed
    assert result.per_user["list_length"].tolist() == [3, 1, 0]
    # Popularity 5 0 1 1 9 3: percentiles (less popular + half of the equals, itself included) / 6.
    percentile = np.array([4.5, 0.5, 2, 2, 5.5, 3.5]) / 6
    cluster = percentile[[1, 2, 3]].mean()
    expected = [(percentile[0] + cluster + percentile[4]) / 3, cluster, 0]
    np.testing.assert_allclose(result.per_user["popularity@10"], expected, rtol=1e-14)


def test_list_quality_looks_at_the_first_sids_only() -> None:
    catalog = catalog_of([(i // 6, i % 6) for i in range(60)], popularity=list(range(60)))
    result = evaluate([list(range(60))], [[0]], catalog)
    assert result.values["coverage@10"] == 10 / 60
    assert result.values["coverage@50"] == 50 / 60
    assert result.values["diversity@10"] == 2 / 10
    assert result.values["popularity@10"] == pytest.approx((4.5 + 0.5) / 60)


def test_unknown_popularity_is_the_middle() -> None:
    catalog = catalog_of([(0, 0), (0, 1), (1, 0)])
    assert evaluate([[0], [1, 2]], [[0], [0]], catalog).values["popularity@10"] == 0.5


@pytest.mark.parametrize("ranked", [[], [2]], ids=["empty list", "target not listed"])
def test_no_target_listed_scores_zero(ranked: list[int]) -> None:
    values = evaluate([ranked], [[0, 5]], COLLIDING).values
    ranking = [key for key in values if key.split("/")[-1].split("@")[0] in ("hr", "ndcg", "recall", "mrr")]
    assert len(ranking) == 28
    assert all(values[key] == 0 for key in ranking)


def test_perfect_list_is_exactly_one() -> None:
    catalog = catalog_of([(i,) for i in range(60)])
    order = np.random.default_rng(0).permutation(60).tolist()
    gains = np.random.default_rng(1).uniform(0.1, 3, 60)
    gains = np.sort(gains)[::-1].tolist()
    values = evaluate([order], [order], catalog, [gains]).values
    assert all(values[f"{p}{m}@{k}"] <= 1 for p in ("", "sid/") for m in ("hr", "ndcg") for k in CUTOFFS)
    assert all(values[f"ndcg@{k}"] == pytest.approx(1, abs=1e-12) for k in CUTOFFS)
    one = evaluate([[5]], [[5]], catalog).values
    assert all(one[f"{p}{m}@{k}"] == 1 for p in ("", "sid/") for m in ("hr", "ndcg") for k in CUTOFFS)


def test_keys() -> None:
    expected = [f"{p}{m}@{k}" for p in ("", "sid/") for m in ("hr", "ndcg") for k in (1, 3, 5, 10, 20, 50)]
    expected += ["recall@32", "mrr", "sid/recall@32", "sid/mrr", "list_length", "diversity@10", "popularity@10"]
    result = evaluate_lists([[0]], [[0]], None, COLLIDING, bootstrap=3, seed=0)
    assert set(result.per_user) == set(result.intervals) == set(expected)
    assert set(result.values) == {*expected, "coverage@10", "coverage@50"}


# --- brute force: every order of the items of every listed Sid


def orders(ranked: list[int], catalog: Catalog) -> list[list[int]]:
    """Every item list that a Sid list stands for; all equally likely."""
    blocks = [list(itertools.permutations(catalog.items_of_sid(sid))) for sid in ranked]
    return [list(itertools.chain(*choice)) for choice in itertools.product(*blocks)]


def textbook(listed: list[int], gain_of: dict[int, float]) -> dict[str, float]:
    """Metrics of one plain ranked list, as any textbook writes them."""
    metrics = {}
    ideal = sorted(gain_of.values(), reverse=True)
    for k in CUTOFFS:
        metrics[f"hr@{k}"] = float(any(item in gain_of for item in listed[:k]))
        dcg = sum(gain_of.get(item, 0) / math.log2(1 + rank) for rank, item in enumerate(listed[:k], start=1))
        metrics[f"ndcg@{k}"] = dcg / sum(gain / math.log2(1 + rank) for rank, gain in enumerate(ideal[:k], start=1))
    metrics[f"recall@{RECALL_CUTOFF}"] = sum(item in gain_of for item in listed[:RECALL_CUTOFF]) / len(gain_of)
    metrics["mrr"] = next((1 / rank for rank, item in enumerate(listed, start=1) if item in gain_of), 0.0)
    return metrics


def brute_force(ranked: list[int], wanted: list[int], gains: list[float], catalog: Catalog) -> dict[str, float]:
    every = [textbook(listed, dict(zip(wanted, gains, strict=True))) for listed in orders(ranked, catalog)]
    metrics = {key: sum(one[key] for one in every) / len(every) for key in every[0]}
    best: dict[int, float] = {}
    for item, gain in zip(wanted, gains, strict=True):
        sid = int(catalog.sid_index_N[item])
        best[sid] = max(best.get(sid, 0), gain)
    metrics |= {f"sid/{key}": value for key, value in textbook(ranked, best).items()}
    return metrics


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Catalog, Lists, Lists, list[list[float]]]:
    """A small catalogue with collisions (clusters of up to 4) and a few users."""
    few_orders = st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(
        lambda sizes: math.prod(map(math.factorial, sizes)) < 600
    )
    sizes = draw(few_orders)
    codes = [(sid // 2, sid % 2) for sid, size in enumerate(sizes) for _ in range(size)]
    catalog = catalog_of(draw(st.permutations(codes)))
    lists, targets, gains = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(len(sizes))))
        lists.append(list(order[: draw(st.integers(0, len(sizes)))]))
        wanted = draw(st.lists(st.integers(0, len(codes) - 1), min_size=1, max_size=5, unique=True))
        targets.append(wanted)
        gain = st.floats(0.01, 5, allow_nan=False)
        gains.append(draw(st.lists(gain, min_size=len(wanted), max_size=len(wanted))))
    return catalog, lists, targets, gains


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_every_metric_is_the_mean_over_all_orders(world: tuple[Catalog, Lists, Lists, list[list[float]]]) -> None:
    catalog, lists, targets, gains = world
    result = evaluate(lists, targets, catalog, gains)
    for user in range(len(lists)):
        expected = brute_force(lists[user], targets[user], gains[user], catalog)
        assert len(expected) == 28
        for key, value in expected.items():
            assert result.per_user[key][user] == pytest.approx(value, abs=1e-12), (user, key)


def test_no_gains_means_gains_of_one() -> None:
    lists, targets = [[1, 3, 0], [2]], [[2, 5, 0], [4]]
    ones = evaluate(lists, targets, COLLIDING, [[1.0, 1.0, 1.0], [1.0]])
    assert evaluate(lists, targets, COLLIDING).values == ones.values


def test_large_clusters_against_random_orders() -> None:
    """Cutoffs 20, 32 and 50 inside clusters, where enumeration ends: 4 standard errors of 4,000 random orders."""
    catalog = catalog_of([(0,)] * 7 + [(1,)] * 30 + [(2,)] * 25 + [(3,)] * 5)
    ranked, wanted, gains = [0, 1, 2], [8, 9, 10, 40, 41, 63], [1.0, 2.0, 3.0, 1.5, 1.0, 2.0]
    result = evaluate([ranked], [wanted], catalog, [gains])
    rng = np.random.default_rng(0)
    gain_of = dict(zip(wanted, gains, strict=True))
    blocks = [catalog.items_of_sid(sid) for sid in ranked]
    drawn = [textbook([int(i) for block in blocks for i in rng.permutation(block)], gain_of) for _ in range(4000)]
    for key in drawn[0]:
        sample = np.array([one[key] for one in drawn])
        assert abs(sample.mean() - result.values[key]) <= 4 * sample.std() / math.sqrt(len(sample)) + 1e-9, key


# --- bootstrap


def hits(wins: np.ndarray, bootstrap: int = 2000, seed: int = 0) -> EvalResult:
    """A result whose hr@1 of each user is 1 or 0, as given."""
    catalog = catalog_of([(0,), (1,)])
    lists = [[0] if win else [1] for win in wins]
    return evaluate_lists(lists, [[0]] * len(lists), None, catalog, bootstrap=bootstrap, seed=seed)


def test_interval_is_the_binomial_one() -> None:
    wins = np.arange(1000) < 300
    low, high = hits(wins).intervals["hr@1"]
    error = math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.15 * error)


def test_interval_of_a_constant_is_a_point() -> None:
    assert hits(np.ones(50, dtype=bool), 100).intervals["hr@1"] == (1, 1)
    assert hits(np.ones(1, dtype=bool), 1).intervals["hr@1"] == (1, 1)


def test_seeds() -> None:
    wins = np.arange(200) % 3 == 0
    assert hits(wins, 50, seed=5).intervals == hits(wins, 50, seed=5).intervals
    assert len({hits(wins, 50, seed=seed).intervals["hr@1"] for seed in range(5)}) > 1


def test_chunks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    wins = np.arange(200) % 3 == 0
    whole = hits(wins, 101).intervals["hr@1"]
    monkeypatch.setattr("rl.metrics._CHUNK_NUMBERS", 200 * 7)
    assert hits(wins, 101).intervals["hr@1"] == pytest.approx(whole, abs=1e-12)


def test_no_resamples_no_intervals() -> None:
    assert hits(np.ones(3, dtype=bool), 0).intervals == {}


def test_paired_difference() -> None:
    before, after = np.arange(1000) < 300, np.arange(1000) < 340  # 40 users gain, none loses
    diff, low, high = paired_difference(hits(before, 0), hits(after, 0), "hr@1", bootstrap=2000, seed=1)
    error = math.sqrt(0.04 * 0.96 / 1000)
    assert diff == pytest.approx(0.04)
    assert low == pytest.approx(0.04 - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(0.04 + 1.96 * error, abs=0.2 * error)
    # The paired interval excludes 0 where the two separate ones overlap.
    assert low > 0 and hits(before).intervals["hr@1"][1] > hits(after).intervals["hr@1"][0]
    assert paired_difference(hits(before, 0), hits(before, 0), "mrr") == (0, 0, 0)
    assert paired_difference(hits(after, 0), hits(before, 0), "hr@1")[0] == pytest.approx(-0.04)


def test_paired_difference_refuses() -> None:
    three, four = hits(np.ones(3, dtype=bool), 0), hits(np.ones(4, dtype=bool), 0)
    with pytest.raises(ValueError, match=r"3 rows in a, 4 in b"):
        paired_difference(three, four, "hr@1")
    with pytest.raises(ValueError, match="coverage@10"):
        paired_difference(three, three, "coverage@10")
    with pytest.raises(ValueError, match="bootstrap=0"):
        paired_difference(three, three, "hr@1", bootstrap=0)


# --- what is refused


@pytest.mark.parametrize(
    ("lists", "targets", "gains", "message"),
    [
        ([[0], [1]], [[0]], None, "2 lists for 1 target sets"),
        ([], [], None, "no user"),
        ([[0], [0]], [[0], []], None, "user 1 has no target"),
        ([[0], [1, 4]], [[0], [0]], None, r"list of user 1: sid 4 is out of range \[0, 4\)"),
        ([[-1]], [[0]], None, "list of user 0: sid -1 is out of range"),
        ([[0], [1, 2, 1]], [[0], [0]], None, "list of user 1: sid 1 stands there twice"),
        ([[0]], [[6]], None, r"targets of user 0: item 6 is out of range \[0, 6\)"),
        ([[0]], [[3, 3]], None, "targets of user 0: item 3 stands there twice"),
        ([[0]], [[0]], [], "0 rows of gains for 1 target sets"),
        ([[0], [0]], [[0], [1, 2]], [[1.0], [1.0]], "user 1 has 1 gains for 2 targets"),
        ([[0], [0]], [[0], [1, 2]], [[1.0], [1.0, 0.0]], "user 1: gain 0.0 must be > 0"),
        ([[0]], [[0]], [[math.nan]], "user 0: gain nan must be > 0"),
    ],
)
def test_refuses(lists: Lists, targets: Lists, gains: list[list[float]] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(lists, targets, COLLIDING, gains)


def test_refuses_negative_bootstrap() -> None:
    with pytest.raises(ValueError, match="bootstrap=-1"):
        evaluate_lists([[0]], [[0]], None, COLLIDING, bootstrap=-1, seed=0)
