"""Rankings: log-probabilities over all permutations, draws, and the gradient of an expected NDCG."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from rl.plackett_luce import draw_rankings, logp_among_candidates, logp_in_catalogue

SCORES = torch.tensor([0.3, -1.2, 2.0, 0.9])


def ranked(scores: torch.Tensor, orders: list[tuple[int, ...]]) -> torch.Tensor:
    return scores[torch.tensor(orders)][None]


def test_three_candidates_by_hand() -> None:
    """Scores log 1, log 2, log 3: P(3, 1, 2) = 3/6 · 1/3."""
    scores = torch.tensor([1.0, 2.0, 3.0]).log()
    found = logp_among_candidates(ranked(scores, [(2, 0, 1), (0, 1, 2)]), torch.ones(1, 2, 3, dtype=torch.bool))
    assert found.exp().tolist()[0] == pytest.approx([1 / 6, 1 / 6 * 2 / 5])


def test_all_permutations_sum_to_one() -> None:
    orders = list(permutations(range(4)))
    there = torch.ones(1, len(orders), 4, dtype=torch.bool)
    assert float(logp_among_candidates(ranked(SCORES, orders), there).exp().sum()) == pytest.approx(1.0)
    logps = SCORES.log_softmax(dim=0)
    for length in (1, 2, 3):
        some = list(permutations(range(4), length))
        found = logp_in_catalogue(ranked(logps, some), there[:, : len(some), :length])
        assert float(found.exp().sum()) == pytest.approx(1.0)


def test_both_forms_agree_on_a_catalogue_that_is_ranked_whole() -> None:
    orders = list(permutations(range(4)))
    there = torch.ones(1, len(orders), 4, dtype=torch.bool)
    one = logp_among_candidates(ranked(SCORES, orders), there)
    two = logp_in_catalogue(ranked(SCORES.log_softmax(dim=0), orders), there)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_padding_counts_nothing() -> None:
    there = torch.tensor([[[True, True, False]]])
    padded, short = torch.tensor([[[0.5, -0.3, 7.0]]]), torch.tensor([[[0.5, -0.3]]])
    torch.testing.assert_close(logp_among_candidates(padded, there), logp_among_candidates(short, there[..., :2]))
    logps = short.log_softmax(-1) - 0.4
    wide = torch.cat([logps, torch.full((1, 1, 1), 3.0)], dim=-1).requires_grad_()
    found = logp_in_catalogue(wide, there)
    torch.testing.assert_close(found, logp_in_catalogue(logps, there[..., :2]))
    found.sum().backward()
    assert wide.grad is not None and wide.grad[0, 0, 2] == 0 and wide.grad.isfinite().all()


def test_a_certain_item_leaves_finite_numbers() -> None:
    """All mass on the first item: the rest is not resolved in float32, and must not become infinite."""
    logps = torch.tensor([[[0.0, -18.0, -19.0]]], requires_grad=True)
    found = logp_in_catalogue(logps, torch.ones(1, 1, 3, dtype=torch.bool))
    found.sum().backward()
    assert found.isfinite().all() and logps.grad is not None and logps.grad.isfinite().all()


def test_draws_have_their_probabilities() -> None:
    orders = list(permutations(range(4)))
    drawn = draw_rankings(SCORES.numpy(), 20_000, np.random.default_rng(0))
    there = torch.ones(1, len(orders), 4, dtype=torch.bool)
    expected = logp_among_candidates(ranked(SCORES, orders), there).exp()[0].tolist()
    counts = {order: 0 for order in orders}
    for order in map(tuple, drawn.tolist()):
        counts[order] += 1
    for order, chance in zip(orders, expected, strict=True):
        assert counts[order] / 20_000 == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 20_000) ** 0.5 + 1e-9)


@pytest.mark.parametrize("form", ["candidates", "catalogue"])
def test_score_function_gradient_is_that_of_the_expected_reward(form: str) -> None:
    """E[reward · ∇ log P(ranking)] over every ranking = ∇ E[reward], NDCG@2 of item 1."""
    scores = SCORES.double().clone().requires_grad_()
    length = 4 if form == "candidates" else 2
    orders = list(permutations(range(4), length))
    rewards = torch.tensor([1 / np.log2(2 + order.index(1)) if 1 in order[:2] else 0.0 for order in orders])
    there = torch.ones(1, len(orders), length, dtype=torch.bool)

    def logps(of: torch.Tensor) -> torch.Tensor:
        if form == "candidates":
            return logp_among_candidates(ranked(of, orders), there)[0]
        return logp_in_catalogue(ranked(of.log_softmax(dim=0), orders), there)[0]

    chances = logps(scores)
    (exact,) = torch.autograd.grad((chances.exp() * rewards).sum(), scores, retain_graph=True)
    (estimate,) = torch.autograd.grad((chances.detach().exp() * rewards * chances).sum(), scores)
    torch.testing.assert_close(estimate, exact, atol=1e-9, rtol=1e-6)
    assert exact[1] > 0
