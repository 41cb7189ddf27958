"""The critic's arithmetic, and rewards of single tokens, by hand and by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.protocol import ScoredGroup
from rl.credit import rewards_to_go, token_rewards
from rl.critic import explained_variance, gae, value_loss, whitened
from rollout.catalog import Catalog
from rollout.sid import letters_format
from rollout.types import Record, Rollout, RolloutGroup, Sample


def test_gae_by_hand() -> None:
    """Two tokens, then one token and a pad; γ .5, λ .5."""
    rewards = torch.tensor([[1.0, 4.0], [2.0, 9.0]])
    values = torch.tensor([[2.0, 6.0], [3.0, 9.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # row 0: δ1 = 4 - 6 = -2; δ0 = 1 + 3 - 2 = 2; A0 = 2 + .25 · -2 = 1.5. Row 1: δ0 = 2 - 3 = -1.
    assert advantages.tolist() == [[1.5, -2.0], [-1.0, 0.0]]
    assert returns.tolist() == [[3.5, 4.0], [2.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_gae_is_the_sum_of_discounted_errors(seed: int, lengths: list[int], gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = max(lengths)
    rewards, values = (torch.randn((len(lengths), wide), generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1] * n + [0] * (wide - n) for n in lengths])
    found, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, n in enumerate(lengths):
        value = [*values[row, :n].tolist(), 0.0]
        errors = [float(rewards[row, t]) + gamma * value[t + 1] - value[t] for t in range(n)]
        expected = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]
        assert found[row, :n].tolist() == pytest.approx(expected, abs=1e-9)
        assert found[row, n:].tolist() == [0.0] * (wide - n)
        assert returns[row, :n].tolist() == pytest.approx([a + v for a, v in zip(expected, value, strict=False)])


def test_gae_of_lambda_one_is_the_return_less_the_value() -> None:
    rewards, values = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.5, 0.25, 2.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=1.0)
    assert returns.tolist() == [[4.0, 4.0, 3.0]]
    assert advantages.tolist() == [[3.5, 3.75, 1.0]]


def test_value_loss_by_hand() -> None:
    values = torch.tensor([[1.0, 0.0, 5.0]], requires_grad=True)
    before, returns = torch.tensor([[0.0, 0.1, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    mask = torch.tensor([[1, 1, 0]])
    # token 0: clipped to .2, (0.2 - 2)² = 3.24 > 1; token 1: inside the range, (0 - 1)² = 1; token 2 is padding.
    loss = value_loss(values, before, returns, mask, clip=0.2)
    assert float(loss) == pytest.approx(0.5 * (3.24 + 1.0) / 2)
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, pytest.approx(-0.5), 0.0]]  # where the clipped error is worse, no gradient


def test_whitened_and_explained_variance() -> None:
    mask = torch.tensor([[1, 1], [1, 0]])
    white = whitened(torch.tensor([[1.0, 2.0], [3.0, 99.0]]), mask)
    assert white.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    returns = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((2, 2), 7.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones(2, 2), mask) == 0.0


# Rewards of tokens ----------------------------------------------------------------------------------------------------

CODES = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 0)]  # the last shares its Sid with the third


@pytest.fixture
def catalog() -> Catalog:
    return Catalog.build(letters_format((2, 2, 2)), [str(i) for i in range(5)], np.array(CODES))


def scored(catalog: Catalog, sids: list[int | None], targets: tuple[int, ...], text: int = 0) -> ScoredGroup:
    rollouts = []
    for sid in sids:
        kept = () if sid is None else (sid,)
        on = (False,) * text + (True,) * 3
        rollouts.append(
            Rollout(
                (9,) * len(on),
                (0.0,) * len(on),
                on,
                kept,
                tuple(map(catalog.items_of_sid, kept)),
                0,
                "item" if kept else "illegal",
            )
        )
    sample = Sample(Record("r:1", "", (), targets, (1.0,) * len(targets)), (1,))
    total = tuple(10.0 * (place + 1) for place in range(len(sids)))
    return ScoredGroup(RolloutGroup(sample, tuple(rollouts)), {"r": total}, {}, total)


def test_prefix_credit_by_hand(catalog: Catalog) -> None:
    """Target (0, 0, 0): the item itself, one with two codes, one with one, one with none, and an illegal one."""
    group = scored(catalog, [0, 1, 2, 3, None], targets=(0,))
    (found,) = token_rewards([group], catalog, 0.5, 4)
    assert found.tolist() == [
        [0.5, 0.5, 10.0, 0.0],
        [0.5, 0.5, 20.0, 0.0],
        [0.5, 0.0, 30.0, 0.0],
        [0.0, 0.0, 40.0, 0.0],
        [0.0, 0.0, 50.0, 0.0],
    ]
    assert rewards_to_go(found)[0].tolist() == [11.0, 10.5, 10.0, 0.0]


def test_prefix_credit_takes_the_nearest_target_and_skips_text(catalog: Catalog) -> None:
    group = scored(catalog, [1, 3], targets=(2, 3), text=2)
    (found,) = token_rewards([group], catalog, 1.0, 5)
    assert found.tolist() == [[0, 0, 1.0, 0.0, 10.0], [0, 0, 1.0, 1.0, 20.0]]


def test_no_credit_leaves_the_total_at_the_end(catalog: Catalog) -> None:
    (found,) = token_rewards([scored(catalog, [0, 3], targets=(0,))], catalog, 0.0, 3)
    assert found.tolist() == [[0, 0, 10.0], [0, 0, 20.0]]
