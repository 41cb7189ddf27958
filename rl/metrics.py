"""Recommender metrics of ranked Sid lists, with collisions counted honestly.

A list names Sids, a user wants items, and several items may share a Sid. A listed Sid stands for its n items in
uniformly random order, and every item-level metric is the exact expectation over those orders, in closed form (no
sampling, no lucky tie-breaks). Keys with the prefix `sid/` treat Sids as the items. Formulas: docs/metrics.md.

Axes: U users, W longest list, S distinct Sids, N items, T targets of all users end to end, C pairs (user, Sid) that
hold a target, R resamples, M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from rollout.catalog import Catalog

CUTOFFS = (1, 3, 5, 10, 20, 50)
RECALL_CUTOFF = 32
COVERAGE_CUTOFFS = (10, 50)
QUALITY_CUTOFF = 10
SID_PREFIX = "sid/"

_EMPTY = -1  # fills short lists up to W
_UNLISTED = 2**40  # `before` of a target that the list does not hold: beyond every cutoff
_CHUNK_NUMBERS = 4_000_000  # resample counts held in memory at once


@dataclass(frozen=True)
class EvalResult:
    """Metrics of one evaluation.

    Attributes:
        values: every metric, the mean over users (coverage: a property of all lists together).
        intervals: 95 % bootstrap interval of every per-user metric; empty without resamples.
        per_user: the metric of each user, float64 [U], in the order of the lists; coverage has none.
        rows: number of users.
    """

    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    per_user: Mapping[str, np.ndarray]
    rows: int


def evaluate_lists(
    lists: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    gains: Sequence[Sequence[float]] | None,
    catalog: Catalog,
    *,
    bootstrap: int,
    seed: int,
) -> EvalResult:
    """Every metric of ranked lists, with 95 % percentile bootstrap intervals over users.

    A list shorter than a cutoff is scored as it is; an empty list (nothing legal was written) and a target that is not
    listed score 0.

    Args:
        lists: per user, distinct sid indices, best first; may be empty.
        targets: per user, distinct item indices, at least one.
        gains: per user, the relevance (> 0) of each target; None makes all 1.
        catalog: the catalogue that both index into.
        bootstrap: resamples of the users; 0 gives no intervals.
        seed: seeds the resamples.

    Raises:
        ValueError: when the numbers of lists and targets differ, there is no user, a user has no target, gains do not
            fit the targets or are not > 0, or a row repeats an index or names one that the catalogue does not have.
    """
    if len(lists) != len(targets):
        raise ValueError(f"{len(lists)} lists for {len(targets)} target sets; one of each a user")
    if len(lists) == 0:
        raise ValueError("no user to evaluate: lists and targets are empty")
    if bootstrap < 0:
        raise ValueError(f"eval.bootstrap={bootstrap} must be at least 0")
    lists_UW = _padded(lists, len(catalog.sids_SL))
    user_T, item_T, gain_T = _flat_targets(targets, gains, len(catalog))
    items, sids = _find_targets(lists_UW, user_T, item_T, gain_T, catalog)

    per_user = _ranking_metrics(items, len(lists))
    per_user |= {SID_PREFIX + key: value for key, value in _ranking_metrics(sids, len(lists)).items()}
    per_user |= _list_quality(lists_UW, catalog)
    values = {key: float(metric_U.mean()) for key, metric_U in per_user.items()}
    values |= {f"coverage@{k}": _coverage(lists_UW[:, :k], catalog) for k in COVERAGE_CUTOFFS}
    intervals = _bootstrap(per_user, bootstrap, seed)
    return EvalResult(values=values, intervals=intervals, per_user=per_user, rows=len(lists))


def paired_difference(
    a: EvalResult, b: EvalResult, key: str, bootstrap: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """`b - a` (after minus before) on the same users: (difference, low, high) of its 95 % paired bootstrap interval.

    Resampling the per-user differences takes out what makes some users easy and others hard, so the interval is
    narrower than the two separate ones suggest.

    Raises:
        ValueError: when the results are not of the same number of users, `key` is no per-user metric, or bootstrap < 1.
    """
    if a.rows != b.rows:
        raise ValueError(f"a paired difference needs the same users: {a.rows} rows in a, {b.rows} in b")
    shared = set(a.per_user) & set(b.per_user)
    if key not in shared:
        raise ValueError(f"{key!r} is no per-user metric of both results; known: {sorted(shared)}")
    if bootstrap < 1:
        raise ValueError(f"bootstrap={bootstrap} must be at least 1")
    difference_U = b.per_user[key] - a.per_user[key]
    low, high = _bootstrap({key: difference_U}, bootstrap, seed)[key]
    return float(difference_U.mean()), low, high


@dataclass(frozen=True)
class _Hits:
    """Where the targets are, for one notion of item.

    `before_C` counts the items ahead of the cluster (`_UNLISTED` when it is not in the list), `size_C` the items n that
    share its places, `held_C` the targets m among them. Pairs are ordered by user, and so are targets.
    """

    user_T: np.ndarray
    gain_T: np.ndarray
    cluster_T: np.ndarray
    user_C: np.ndarray
    before_C: np.ndarray
    size_C: np.ndarray
    held_C: np.ndarray


def _padded(lists: Sequence[Sequence[int]], sids: int) -> np.ndarray:
    """Lists as one array [U, W], short ones filled up with `_EMPTY`."""
    length_U = np.array([len(ranked) for ranked in lists], dtype=np.int64)
    lists_UW = np.full((len(lists), max(1, int(length_U.max()))), _EMPTY, dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(length_U.sum()))
    user = np.repeat(np.arange(len(lists)), length_U)
    _check_indices(user, flat, sids, "list", "sid")
    lists_UW[np.arange(lists_UW.shape[1]) < length_U[:, None]] = flat
    return lists_UW


def _flat_targets(
    targets: Sequence[Sequence[int]], gains: Sequence[Sequence[float]] | None, items: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets of all users end to end: (user_T, item_T, gain_T)."""
    count_U = np.array([len(wanted) for wanted in targets], dtype=np.int64)
    if (count_U == 0).any():
        raise ValueError(f"user {int(np.argmin(count_U))} has no target item")
    user_T = np.repeat(np.arange(len(targets)), count_U)
    item_T = np.fromiter(chain.from_iterable(targets), dtype=np.int64, count=len(user_T))
    _check_indices(user_T, item_T, items, "targets", "item")
    if gains is None:
        return user_T, item_T, np.ones(len(user_T))
    if len(gains) != len(targets):
        raise ValueError(f"{len(gains)} rows of gains for {len(targets)} target sets; one of each a user")
    gains_U = np.array([len(row) for row in gains], dtype=np.int64)
    if (gains_U != count_U).any():
        user = int((gains_U != count_U).argmax())
        raise ValueError(f"user {user} has {gains_U[user]} gains for {count_U[user]} targets")
    gain_T = np.fromiter(chain.from_iterable(gains), dtype=np.float64, count=len(user_T))
    bad = ~((gain_T > 0) & np.isfinite(gain_T))
    if bad.any():
        raise ValueError(f"user {user_T[bad.argmax()]}: gain {gain_T[bad.argmax()]} must be > 0 and finite")
    return user_T, item_T, gain_T


def _check_indices(user: np.ndarray, index: np.ndarray, size: int, what: str, kind: str) -> None:
    bad = (index < 0) | (index >= size)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{what} of user {user[row]}: {kind} {index[row]} is out of range [0, {size})")
    key = np.sort(user * size + index)
    twice = key[1:] == key[:-1]
    if twice.any():
        first = key[int(twice.argmax())]
        raise ValueError(f"{what} of user {first // size}: {kind} {first % size} stands there twice")


def _find_targets(
    lists_UW: np.ndarray, user_T: np.ndarray, item_T: np.ndarray, gain_T: np.ndarray, catalog: Catalog
) -> tuple[_Hits, _Hits]:
    """Places of the targets, at item level and at Sid level.

    A target Sid is as relevant as its best target item (maximum, not sum): it fills one place of the list, and the user
    gets one item for it.
    """
    size_S = catalog.cluster_sizes_S
    key_C, cluster_T, held_C = np.unique(
        user_T * len(size_S) + catalog.sid_index_N[item_T], return_inverse=True, return_counts=True
    )
    user_C, sid_C = key_C // len(size_S), key_C % len(size_S)
    same_CW = lists_UW[user_C] == sid_C[:, None]
    rank_C = same_CW.argmax(axis=1)
    listed_C = same_CW.any(axis=1)
    size_UW = np.where(lists_UW == _EMPTY, 0, size_S[lists_UW])
    before_UW = np.cumsum(size_UW, axis=1) - size_UW
    items = _Hits(
        user_T=user_T,
        gain_T=gain_T,
        cluster_T=cluster_T,
        user_C=user_C,
        before_C=np.where(listed_C, before_UW[user_C, rank_C], _UNLISTED),
        size_C=size_S[sid_C],
        held_C=held_C,
    )
    best_C = np.zeros(len(key_C))
    np.maximum.at(best_C, cluster_T, gain_T)
    sids = _Hits(
        user_T=user_C,
        gain_T=best_C,
        cluster_T=np.arange(len(key_C)),
        user_C=user_C,
        before_C=np.where(listed_C, rank_C, _UNLISTED),
        size_C=np.ones_like(sid_C),
        held_C=np.ones_like(sid_C),
    )
    return items, sids


def _ranking_metrics(hits: _Hits, users: int) -> dict[str, np.ndarray]:
    """HR, NDCG, Recall and MRR of every user, each [U]."""
    metrics = {f"hr@{k}": _hit_rate(hits, k, users) for k in CUTOFFS}
    metrics |= {f"ndcg@{k}": _ndcg(hits, k, users) for k in CUTOFFS}
    metrics[f"recall@{RECALL_CUTOFF}"] = _recall(hits, RECALL_CUTOFF, users)
    metrics["mrr"] = _reciprocal_rank(hits, users)
    return metrics


def _inside(hits: _Hits, k: int) -> np.ndarray:
    """Places of each cluster that lie within the first k, [C]."""
    return np.clip(k - hits.before_C, 0, hits.size_C)


def _hit_rate(hits: _Hits, k: int, users: int) -> np.ndarray:
    """P(at least one target in the first k).

    With t of a cluster's n places inside the cutoff, all of its m targets miss them with probability
    C(n-m, t) / C(n, t) = prod over i < m of (n - t - i) / (n - i). At most one cluster straddles the cutoff and the
    others miss with probability 0 or 1, so the product over clusters is exact.
    """
    outside_C = hits.size_C - _inside(hits, k)
    miss_C = np.ones(len(outside_C))
    for i in range(int(hits.held_C.max())):
        more_C = hits.held_C > i
        miss_C[more_C] *= (np.maximum(outside_C - i, 0) / np.maximum(hits.size_C - i, 1))[more_C]
    miss_U = np.ones(users)
    np.multiply.at(miss_U, hits.user_C, miss_C)
    return 1 - miss_U


def _recall(hits: _Hits, k: int, users: int) -> np.ndarray:
    """Mean over targets of P(rank <= k) = clip((k - before) / n, 0, 1)."""
    chance_T = (_inside(hits, k) / hits.size_C)[hits.cluster_T]
    return np.bincount(hits.user_T, chance_T, users) / np.bincount(hits.user_T, minlength=users)


def _ndcg(hits: _Hits, k: int, users: int) -> np.ndarray:
    """E[DCG@k] / IDCG@k with linear gains: a target's discount is the mean over its cluster's n places, 0 beyond k."""
    total = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])  # total[r]: discounts of ranks 1 to r
    last_C = np.minimum(hits.before_C + hits.size_C, k)
    discount_C = (total[last_C] - total[np.minimum(hits.before_C, k)]) / hits.size_C
    dcg_U = np.bincount(hits.user_T, hits.gain_T * discount_C[hits.cluster_T], users)

    by_gain = np.lexsort((-hits.gain_T, hits.user_T))  # users stay in order, so user_T still names each position's user
    start_U = np.searchsorted(hits.user_T, np.arange(users))
    place_T = np.minimum(np.arange(len(hits.user_T)) - start_U[hits.user_T], k)
    discount = np.append(np.diff(total), 0.0)  # the same floats as above, so that a perfect list of one target gives 1
    ideal_U = np.bincount(hits.user_T, hits.gain_T[by_gain] * discount[place_T], users)
    return np.minimum(dcg_U / ideal_U, 1.0)  # float error can lift a perfect list one bit above 1


def _reciprocal_rank(hits: _Hits, users: int) -> np.ndarray:
    """E[1 / rank of the first target] over the whole list, 0 when none is listed.

    The first listed cluster that holds targets decides. Its first target is the minimum of m distinct places of n:
    P(min = j) = C(n-j, m-1) / C(n, m).
    """
    by_place = np.lexsort((hits.before_C, hits.user_C))
    _, first = np.unique(hits.user_C[by_place], return_index=True)
    first_C = by_place[first]
    first_C = first_C[hits.before_C[first_C] < _UNLISTED]
    cases, case_of = np.unique(
        np.stack([hits.before_C, hits.size_C, hits.held_C], axis=1)[first_C], axis=0, return_inverse=True
    )
    expected = np.array([_expected_inverse_rank(int(b), int(n), int(m)) for b, n, m in cases], dtype=np.float64)
    result_U = np.zeros(users)
    result_U[hits.user_C[first_C]] = expected[case_of.reshape(-1)]
    return result_U


def _expected_inverse_rank(before: int, n: int, m: int) -> float:
    """Sum over j of P(min = j) / (before + j), with P(min = j + 1) = P(min = j) * (n - j - m + 1) / (n - j)."""
    place = np.arange(1, n - m + 2)
    ratio = (n - place[:-1] - m + 1) / (n - place[:-1])
    weight = np.cumprod(np.concatenate([[m / n], ratio]))
    return float(np.sum(weight / (before + place)))


def _list_quality(lists_UW: np.ndarray, catalog: Catalog) -> dict[str, np.ndarray]:
    """Diversity and popularity of the first 10 Sids of each list, and its length, each [U]; 0 for an empty list."""
    top_UW = lists_UW[:, :QUALITY_CUTOFF]
    listed_UW = top_UW != _EMPTY
    count_U = np.maximum(listed_UW.sum(axis=1), 1)
    code_UW = np.sort(np.where(listed_UW, catalog.sids_SL[top_UW, 0], -1), axis=1)
    fresh_UW = np.diff(code_UW, axis=1, prepend=-1) > 0
    popularity_UW = np.where(listed_UW, _popularity_percentile(catalog)[top_UW], 0.0)
    return {
        f"diversity@{QUALITY_CUTOFF}": fresh_UW.sum(axis=1) / count_U,
        f"popularity@{QUALITY_CUTOFF}": popularity_UW.sum(axis=1) / count_U,
        "list_length": (lists_UW != _EMPTY).sum(axis=1).astype(np.float64),
    }


def _popularity_percentile(catalog: Catalog) -> np.ndarray:
    """Popularity percentile of every Sid, [S]: the mean over its items.

    An item's percentile is the share of items less popular than it plus half the share equally popular (itself
    included): 0.5 for all where popularity is unknown, and 0.5 on average over any catalogue.
    """
    ascending = np.sort(catalog.popularity_N)
    below_N = np.searchsorted(ascending, catalog.popularity_N, side="left")
    up_to_N = np.searchsorted(ascending, catalog.popularity_N, side="right")
    percentile_N = (below_N + up_to_N) / (2 * len(catalog))
    return np.bincount(catalog.sid_index_N, percentile_N) / catalog.cluster_sizes_S


def _coverage(top_UW: np.ndarray, catalog: Catalog) -> float:
    """Share of the catalogue's Sids that at least one of the lists names."""
    return len(np.unique(top_UW[top_UW != _EMPTY])) / len(catalog.sids_SL)


def _bootstrap(per_user: Mapping[str, np.ndarray], resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """95 % percentile interval of each mean over users; one set of resamples serves all metrics."""
    if resamples == 0:
        return {}
    metrics_UM = np.stack(list(per_user.values()), axis=1)
    users = len(metrics_UM)
    rng = np.random.default_rng(seed)
    means = []
    chunk = max(1, _CHUNK_NUMBERS // users)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn_RU = rng.integers(users, size=(rows, users)) + np.arange(rows)[:, None] * users
        counts_RU = np.bincount(drawn_RU.reshape(-1), minlength=rows * users).reshape(rows, users)
        means.append(counts_RU.astype(np.float64) @ metrics_UM / users)
    low_M, high_M = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
    return {key: (float(low), float(high)) for key, low, high in zip(per_user, low_M, high_M, strict=True)}
