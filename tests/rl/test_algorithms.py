"""Advantages, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from configs.schema import RunConfig
from configs.update import RLConfig
from rl.algorithms import EPSILON, Algorithm, build_algorithm, without_signal

# Means 2, 0.25, 5; standard deviations (n - 1): sqrt(8/3), 0.5, 0.
REWARDS = np.array([[0.0, 2.0, 2.0, 4.0], [1.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
CENTRED = np.array([[-2.0, 0.0, 0.0, 2.0], [0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]])


def advantages(scale: str, rewards: np.ndarray = REWARDS) -> np.ndarray:
    return Algorithm("grpo", "grpo", scale).advantages(rewards)


def test_scale_none() -> None:
    assert advantages("none").tolist() == CENTRED.tolist()


def test_scale_group() -> None:
    expected = [
        [-2 / (1.6329931618554521 + 1e-4), 0.0, 0.0, 2 / (1.6329931618554521 + 1e-4)],
        [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001],
        [0.0, 0.0, 0.0, 0.0],
    ]
    np.testing.assert_allclose(advantages("group"), expected, rtol=1e-12)


def test_scale_batch() -> None:
    """Sum of the twelve rewards 29, of their squares 125: variance (125 - 29²/12) / 11 = 4.9924242."""
    np.testing.assert_allclose(advantages("batch"), CENTRED / (4.992424242424242**0.5 + 1e-4), rtol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_teach_nothing(scale: str) -> None:
    assert not advantages(scale, np.full((2, 4), 0.3)).any()
    assert not advantages(scale)[2].any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_group_sum_to_zero(scale: str) -> None:
    rewards = np.random.default_rng(0).random((5, 8))
    np.testing.assert_allclose(advantages(scale, rewards).sum(axis=1), 0, atol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_one_is_refused(scale: str) -> None:
    with pytest.raises(ValueError, match="groups of 1 rollout .*rollout.group_size must be >= 2"):
        advantages(scale, np.ones((3, 1)))


def test_group_scale_ignores_other_groups_and_batch_scale_does_not() -> None:
    louder = REWARDS.copy()
    louder[1] *= 10
    assert advantages("group")[0].tolist() == advantages("group", louder)[0].tolist()
    assert advantages("batch")[0, 0] < advantages("batch", louder)[0, 0] < 0


def test_without_signal() -> None:
    rewards = np.array([[0.0, 0.0], [0.1, 0.1], [0.0, 1e-6], [0.3 - 0.2, 0.1], [-1.0, 1.0]])
    assert without_signal(rewards).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 / 3])
def test_nearly_equal_rewards_do_not_explode(value: float) -> None:
    """The rounding of a mean is no signal."""
    rewards = np.full((1, 7), value)
    assert np.abs(advantages("group", rewards)).max() <= 1e-4
    assert EPSILON == 1e-4


def test_build_algorithm() -> None:
    config = RunConfig(rl=RLConfig(scale_rewards="batch"))
    assert build_algorithm(config) == Algorithm("grpo", "grpo", "batch")
