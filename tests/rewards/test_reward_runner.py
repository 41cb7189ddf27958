"""What the runner lets through, and what it says when a reward misbehaves: at build, and in the middle of a run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.schema import RewardConfig
from rewards.protocol import RewardError
from rewards.runner import RewardSet, trial_group
from rollout.catalog import Catalog
from rollout.sid import letters_format
from rollout.types import RolloutGroup

MakeGroup = Callable[..., RolloutGroup]
WriteReward = Callable[..., RewardConfig]


@pytest.fixture
def write_reward(tmp_path: Path) -> WriteReward:
    """A reward `r` in a file from its body, which stands on line 6; it may behave until the run."""

    def write(body: str, only_in_the_run: bool = False) -> RewardConfig:
        path = tmp_path / f"reward{len(list(tmp_path.iterdir()))}.py"
        path.write_text(
            "import numpy as np\nfrom rewards.protocol import *\ndef r(group, catalog):\n"
            f"    if {only_in_the_run} and group.sample.record.source == 'trial call':\n"
            f"        return [0.0] * len(group)\n    {body}\n"
        )
        return RewardConfig(f"{path}:r", name="mine")

    return write


def test_weighted_sum_and_parts(catalog: Catalog, make_group: MakeGroup, write_reward: WriteReward) -> None:
    ours = write_reward("return RewardResult(range(len(group)), {'seen': np.arange(len(group))})")
    rewards = RewardSet([RewardConfig("hit", weight=2.0), ours, RewardConfig("validity", weight=0)], catalog)
    groups = [make_group([0, 1, None], targets=[1]), make_group([0, 1], targets=[0])]
    first, second = rewards.score(groups)
    assert first.group is groups[0]
    assert first.rewards == {"hit": (0.0, 1.0, 0.0), "mine": (0.0, 1.0, 2.0), "validity": (1.0, 1.0, 0.0)}
    assert first.parts == {"hit/list": (1.0, 1.0, 1.0), "mine/seen": (0.0, 1.0, 2.0)}
    assert list(first.total) == [0, 3, 2]
    assert list(second.total) == [2, 1]
    assert {type(value) for values in first.rewards.values() for value in values} == {float}
    assert rewards.score([]) == []
    assert pickle.loads(pickle.dumps(first)) == first


@pytest.mark.parametrize(
    "returned",
    ["[1, 2, 3]", "(1.0, 2, True)", "np.ones(3)", "np.ones(3, dtype=np.float32)", "list(np.ones(3))", "range(3)"],
)
def test_sequences_of_numbers_pass(catalog: Catalog, write_reward: WriteReward, returned: str) -> None:
    RewardSet([write_reward(f"return {returned}")], catalog)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1, 2]", "returned 2 values for 3 rollouts: [1, 2] (list)"),
        ("return 0.5", "returned 0.5 (float), must be a list of 3 numbers, one per rollout"),
        ("return np.array(2.0)", "returned array(2.) (ndarray), must be a list of 3 numbers, one per rollout"),
        ("return None", "returned None (NoneType), must be a list of 3 numbers, one per rollout"),
        ("return 'abc'", "returned 'abc' (str), must be a list of 3 numbers, one per rollout"),
        ("return {0: 1, 1: 1, 2: 1}", "returned {0: 1, 1: 1, 2: 1} (dict), must be a list of 3 numbers"),
        ("return {1, 2, 3}", "returned {1, 2, 3} (set), must be a list of 3 numbers"),
        ("return (x for x in range(3))", "(generator), must be a list of 3 numbers"),
        ("return [0, '1', 2]", "returned '1' (str) for rollout 1 of 3, must be a finite number"),
        ("return [0, None, 2]", "returned None (NoneType) for rollout 1 of 3, must be a finite number"),
        ("return [0, 1, float('nan')]", "returned nan (float) for rollout 2 of 3, must be a finite number"),
        ("return np.array([0, np.inf, 0])", "returned np.float64(inf) (float64) for rollout 1 of 3, must be"),
        ("return np.ones((3, 1))", "returned array([1.]) (ndarray) for rollout 0 of 3, must be a finite number"),
        ("return [[1], [1], [1]]", "returned [1] (list) for rollout 0 of 3, must be a finite number"),
        ("return RewardResult([0] * 3, {'x': [1]})", "part 'x': returned 1 values for 3 rollouts: [1] (list)"),
        ("return RewardResult([0] * 3, [1])", "parts must be a dict of names to numbers, got list"),
        ("return [1 / 0] * 3", "ZeroDivisionError: division by zero ("),
        ("return [1 / 0] * 3", "line 6: return [1 / 0] * 3)"),
        ("raise RewardError('no table for ' + group.sample.record.user)", "no table for trial"),
        ("group.rollouts = (); return [0] * 3", "FrozenInstanceError: cannot assign to field 'rollouts' ("),
        ("return np.linalg.inv(np.zeros((2, 2)))", "LinAlgError: Singular matrix ("),
        ("return np.linalg.inv(np.zeros((2, 2)))", "line 6: return np.linalg.inv(np.zeros((2, 2))))"),
    ],
)
def test_trial_call_catches(catalog: Catalog, write_reward: WriteReward, body: str, message: str) -> None:
    with pytest.raises(RewardError) as caught:
        RewardSet([RewardConfig("hit"), write_reward(body)], catalog)
    assert str(caught.value).startswith("reward 'mine', trial call: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [0]", "returned 1 values for 2 rollouts: [0] (list)"),
        ("return [0, float('nan')]", "returned nan (float) for rollout 1 of 2, must be a finite number"),
        ("return [0, 10 ** 400]", "must be a finite number"),
        ("return [catalog.item(99).index] * 2", "IndexError: "),
    ],
)
def test_failures_in_the_run_name_the_reward_and_the_sample(
    catalog: Catalog, make_group: MakeGroup, write_reward: WriteReward, body: str, message: str
) -> None:
    rewards = RewardSet([write_reward(body, only_in_the_run=True)], catalog)
    with pytest.raises(RewardError) as caught:
        rewards.score([make_group([0, None], targets=[0])])
    assert str(caught.value).startswith("reward 'mine', train.csv:17: ")
    assert message in str(caught.value)


def test_trial_group_holds_a_hit_a_miss_and_an_illegal_one(catalog: Catalog) -> None:
    hit, miss, illegal = (rollout.items for rollout in trial_group(catalog).rollouts)
    targets = trial_group(catalog).sample.targets
    assert (hit, miss, illegal) == (((0,),), ((7,),), ())
    assert targets == (0,)
    alone = Catalog.build(letters_format((1,)), ["only"], np.array([[0]]))
    assert trial_group(alone).ranking() == [0]
    RewardSet([RewardConfig("ndcg@10"), RewardConfig("diversity")], alone)
