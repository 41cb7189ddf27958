"""Every algorithm of `--algo`: its advantages by hand, its loss against its formula, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch

from configs.schema import RunConfig
from rl.algorithms import ALGORITHMS, DR_GRPO, GPG, RLOO
from rl.trainers import TRAINERS
from rollout.data.native import write_world
from rollout.data.world import World
from rollout.types import Record
from tests.rl.conftest import MakeTrainer, Run

NAMES = [name for name in ALGORITHMS if name not in TRAINERS]  # the others have tests of their own
DENSE = {"rewards": [{"reward": "prefix"}, {"reward": "ndcg@10"}], "rl.micro_batch_groups": 4}


def test_every_algorithm_can_be_named() -> None:
    assert list(get_type_hints(RunConfig)["algo"].__args__) == list(ALGORITHMS)


# Advantages -----------------------------------------------------------------------------------------------------------

REWARDS = np.array([[0.0, 2.0, 2.0, 4.0], [1.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])


def test_leave_one_out() -> None:
    """Of (0, 2, 2, 4) the others' means are 8/3, 2, 2, 4/3; of (1, 0, 0, 0) 0, 1/3, 1/3, 1/3."""
    found = replace(RLOO, scale_rewards="none").advantages(REWARDS)
    expected = np.array([[-8 / 3, 0, 0, 8 / 3], [1, -1 / 3, -1 / 3, -1 / 3], [0, 0, 0, 0]])
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_dr_grpo_only_centres() -> None:
    found = replace(DR_GRPO, scale_rewards="none").advantages(REWARDS)
    assert found.tolist() == [[-2, 0, 0, 2], [0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]]


def test_gpg_weighs_up_for_groups_without_signal() -> None:
    """One group of three teaches nothing, so the others count 3/2."""
    found = replace(GPG, scale_rewards="none").advantages(REWARDS)
    expected = np.array([[-3, 0, 0, 3], [1.125, -0.375, -0.375, -0.375], [0, 0, 0, 0]])
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert not GPG.advantages(np.ones((2, 4))).any()


# Losses ---------------------------------------------------------------------------------------------------------------


def clipped(ratio: torch.Tensor, advantage: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


Formula = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FORMULAS: dict[str, Formula] = {
    "grpo": lambda logps, sampler, a: clipped((logps - sampler).exp(), a, 0.2, 0.2).mean(dim=1).mean(),
    "dr_grpo": lambda logps, sampler, a: clipped((logps - sampler).exp(), a, 0.2, 0.2).sum() / logps.numel(),
    "rloo": lambda logps, sampler, a: clipped((logps - sampler).exp(), a, 0.2, 0.2).sum() / logps.numel(),
    "gspo": lambda logps, sampler, a: clipped((logps - sampler).mean(dim=1, keepdim=True).exp(), a, 3e-4, 4e-4).mean(),
    "cispo": lambda logps, sampler, a: (-(logps - sampler).exp().clamp(max=5.0).detach() * a * logps).mean(),
    "dapo": lambda logps, sampler, a: clipped((logps - sampler).exp(), a, 0.2, 0.28).sum() / logps.numel(),
    "gpg": lambda logps, sampler, a: (-a * logps).mean(),
}


def advantages_by_hand(name: str, rewards_PG: np.ndarray) -> np.ndarray:
    size = rewards_PG.shape[1]
    others = (rewards_PG.sum(axis=1, keepdims=True) - rewards_PG) / (size - 1)
    if name == "rloo":
        return rewards_PG - others
    centred = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if name == "dr_grpo":
        return centred
    scaled = centred / (rewards_PG.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    silent = (rewards_PG == rewards_PG[:, :1]).all(axis=1).sum()
    return scaled * len(rewards_PG) / (len(rewards_PG) - silent) if name == "gpg" else scaled


def shaken(make_run: MakeTrainer, name: str) -> Run:
    """A run whose policy is no longer the one that its rollouts come from, so that ratios leave the clipping range."""
    run = make_run({"algo": name, "rl.refill_rounds": 0, **DENSE})
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in run.trainer.policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return run


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_formula(make_run: MakeTrainer, name: str) -> None:
    run = shaken(make_run, name)
    trainer = run.trainer
    batch = run.batch()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    found = {n: p.grad.clone() for n, p in trainer.policy.named_parameters() if p.grad is not None}

    trainer.model.zero_grad()
    logps = trainer.scorer.scores(trainer.model, batch).logps_BT
    rewards = np.array([score.total for score in trainer.task.rewards.score(run.fleet.seen[0])])
    assert np.ptp(rewards, axis=1).max() > 0
    advantages = torch.from_numpy(advantages_by_hand(name, rewards).reshape(-1, 1)).float()
    ratio = (logps - batch["sampler_logps"]).exp()
    assert ratio.max() > 1.3 and ratio.min() < 0.7
    FORMULAS[name](logps, batch["sampler_logps"], advantages).backward()
    expected = {n: p.grad for n, p in trainer.policy.named_parameters() if p.grad is not None}

    assert found.keys() == expected.keys()
    one, two = (torch.cat([part[key].reshape(-1) for key in sorted(part)]) for part in (found, expected))
    assert float((one - two).norm() / two.norm()) <= 1e-5


# Dynamic sampling -----------------------------------------------------------------------------------------------------


def test_groups_without_signal_are_replaced(make_run: MakeTrainer) -> None:
    settings = {"rewards": [{"reward": "hit"}], "rl.steps": 1}
    (plain,) = make_run(settings).train()
    run = make_run({**settings, "algo": "dapo", "rl.refill_rounds": 4})
    (line,) = run.train()
    assert plain["zero_signal_groups"] > line["zero_signal_groups"]
    first, *further = run.fleet.seen
    assert line["refilled_groups"] == sum(len(groups) for groups in further) > 0
    assert len({call[2] for call in run.fleet.calls if call[0] == "generate"}) == len(run.fleet.seen)
    drawn = [group.sample.record.source for groups in further for group in groups]
    assert len(set(drawn)) == len(drawn)  # a prompt is not tried twice in a step
    assert len(first) == run.config.rl.prompts_per_step


def test_groups_with_signal_stay(make_run: MakeTrainer) -> None:
    run = make_run({"algo": "dapo", "rewards": [{"reward": "prefix"}], "rl.refill_rounds": 2})
    groups = [group for drawn in run.trainer.generate(run.trainer.samples[:4]) for group in drawn]
    scored = run.trainer.score(groups)
    kept = run.trainer.refill(scored)
    for before, after in zip(scored, kept, strict=True):
        assert after is before or np.ptp(before.total) == 0


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(make_run: MakeTrainer, world: World, tmp_path: Path, name: str) -> None:
    """Four users who all want item 5: after some steps most rollouts are it."""
    rows = tuple(Record(f"train:{user}", f"u{user}", (user, user + 1), (5,), (1.0,)) for user in range(4))
    write_world(replace(world, splits={**world.splits, "train": rows}), tmp_path / "shop")
    run = make_run(
        {
            "algo": name,
            "data.path": str(tmp_path / "shop"),
            "rewards": [{"reward": "hit"}],
            "rollout.group_size": 16,
            "rl.micro_batch_groups": 4,
            "rl.steps": 20,
            "rl.learning_rate": 0.01,
        }
    )
    rewards = [line["reward"] for line in run.train()]
    assert np.mean(rewards[-3:]) > max(0.6, 3 * rewards[0])
