"""PPO on the tiny shop: its loss against its formula, its two learning rates, resume, learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.check import ConfigError
from rl.credit import token_rewards
from rl.critic import gae, value_loss, whitened
from rl.recorder import newest_checkpoint
from rl.trl_ppo import PPOTrainer
from rollout.data.native import write_world
from rollout.data.world import World
from rollout.types import Record
from rollout.weights import checksum, merged_weights
from tests.rl.conftest import MakeConfig, MakeTrainer, Run
from tests.rl.test_trainer import shake, trained, trie_logps

PPO = {"algo": "ppo", "rl.epochs_per_batch": 2}
KINDS = [{"critic.kind": "head"}, {"critic.kind": "model", "critic.hidden_size": 32, "critic.heads": 1}]


def ppo(run: Run) -> PPOTrainer:
    assert isinstance(run.trainer, PPOTrainer)
    return run.trainer


def shake_critic(trainer: PPOTrainer) -> None:
    """A critic that expects something."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in trainer.critic.head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=["head", "model"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "trunk learns values"])
def test_gradient_is_that_of_the_formula(
    make_run: MakeTrainer, kind: dict[str, Any], detach: bool, packing: bool
) -> None:
    """Token rewards with prefix credit and KL, GAE, whitened; clipped ratio and clipped value loss."""
    run = make_run(
        {
            **PPO,
            **kind,
            "critic.detach": detach,
            "rl.prefix_credit": 0.3,
            "rl.kl_coef": 0.2,
            "rl.packing": packing,
            "critic.lam": 0.8,
            "rl.micro_batch_groups": 4,
            "rollout.group_size": 8,
        }
    )
    trainer = ppo(run)
    shake(trainer.policy)
    shake_critic(trainer)
    batch = trainer_batch(run)
    shake(trainer.policy, 0.02)  # as after a first pass: ratios are not 1
    trainer.current_gradient_accumulation_steps = 1
    found = gradients(trainer, trainer.compute_loss(trainer.model, dict(batch)))

    groups = run.fleet.seen[0]
    rollouts = [(group.sample.prompt_ids, rollout) for group in groups for rollout in group.rollouts]
    logps = torch.stack([trie_logps(run, trainer.policy, p, r.token_ids) for p, r in rollouts])
    with torch.no_grad(), trainer.policy.disable_adapter():
        reference = torch.stack([trie_logps(run, trainer.policy, p, r.token_ids) for p, r in rollouts])
    sampler = torch.tensor([r.logps_sampler for _, r in rollouts])
    scored = trainer.task.rewards.score(groups)
    rewards = torch.from_numpy(token_rewards(scored, trainer.task.decoder.catalog, 0.3, 3)).float().flatten(0, 1)
    rewards = rewards - 0.2 * (sampler - reference)
    mask = torch.ones_like(sampler)
    before = batch["values"]
    advantages, returns = gae(rewards, before, mask, gamma=1.0, lam=0.8)
    torch.testing.assert_close(batch["returns"], returns, atol=1e-4, rtol=1e-4)
    ratio, advantages = (logps - sampler).exp(), whitened(advantages, mask)
    policy_loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    values = torch.stack([plain_values(trainer, p, r.token_ids, detach) for p, r in rollouts])
    loss = policy_loss + 0.5 * value_loss(values, before, returns, mask, 0.2)
    expected = gradients(trainer, loss)
    assert found.keys() == expected.keys()
    for name in found:
        assert float((found[name] - expected[name]).norm()) <= 2e-4 * max(1e-2, float(expected[name].norm())), name


def trainer_batch(run: Run) -> dict[str, torch.Tensor]:
    run.fleet.version = -1  # the shaken weights go to the engine first
    return run.batch()


def plain_values(trainer: PPOTrainer, prompt: tuple[int, ...], tokens: tuple[int, ...], detach: bool) -> torch.Tensor:
    """Values [T] of one row without padding or packing."""
    ids = torch.tensor([[*prompt, *tokens]])
    if trainer.critic.trunk is not None:
        hidden = trainer.critic.trunk.model(input_ids=ids).last_hidden_state
    else:
        hidden = trainer.policy.get_base_model().model(input_ids=ids).last_hidden_state
        hidden = hidden.detach() if detach else hidden
    return trainer.critic.head(hidden[0, len(prompt) - 1 : -1])[:, 0]


def gradients(trainer: PPOTrainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    trainer.critic.zero_grad()
    loss.backward()
    named = [*trainer.policy.named_parameters(), *((f"critic.{n}", p) for n, p in trainer.critic.named_parameters())]
    return {name: p.grad.clone() for name, p in named if p.grad is not None and p.grad.abs().max() > 1e-7}


def test_values_are_those_of_the_rollouts(make_run: MakeTrainer) -> None:
    run = make_run({**PPO, "critic.kind": "model"})
    shake_critic(ppo(run))
    batch = run.batch()
    rollouts = [(g.sample.prompt_ids, r) for g in run.fleet.seen[0] for r in g.rollouts]
    for row, (prompt, rollout) in zip(batch["values"], rollouts, strict=True):
        expected = plain_values(ppo(run), prompt, rollout.token_ids, True)
        torch.testing.assert_close(row, expected.detach(), atol=1e-5, rtol=1e-5)


def test_two_passes_two_learning_rates(make_run: MakeTrainer) -> None:
    """The second pass has the first one's rollouts; both rates follow the schedule; the critic moves by its own."""
    run = make_run(
        {**PPO, "rl.steps": 4, "rl.learning_rate": 0.01, "critic.learning_rate": 0.004, "rl.lr_schedule": "linear"}
    )
    critic = {name: p.detach().clone() for name, p in ppo(run).critic.named_parameters()}
    lines = run.train()
    assert len(run.fleet.seen) == 2
    assert ["value_loss" in line for line in lines] == [True] * 4
    assert lines[0]["ratio_error"] <= 1e-5 and "ratio_error" not in lines[1]
    groups = run.trainer.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {0.01, 0.004}
    assert groups[-1]["lr"] / groups[-1]["initial_lr"] == pytest.approx(groups[0]["lr"] / groups[0]["initial_lr"])
    assert any(not torch.equal(p, critic[name]) for name, p in ppo(run).critic.named_parameters())
    assert not any("critic" in name for name in merged_weights(run.trainer.policy))


def test_the_critics_rate_alone_moves_it(make_run: MakeTrainer) -> None:
    run = make_run({**PPO, "rl.steps": 2, "rl.learning_rate": 1e-12, "critic.learning_rate": 1e-3})
    before = trained(run)
    lines = run.train()
    assert lines[1]["value_loss"] < lines[0]["value_loss"]
    assert all(torch.allclose(tensor, before[name], atol=1e-9) for name, tensor in trained(run).items())


@pytest.mark.parametrize("kind", KINDS, ids=["head", "model"])
@pytest.mark.slow
def test_resumed_is_uninterrupted(make_run: MakeTrainer, kind: dict[str, Any]) -> None:
    settings = {**PPO, **kind, "rl.steps": 6, "output.checkpoint_every": 2, "rl.kl_coef": 0.05, "rl.lr_warmup_steps": 2}
    straight, resumed = make_run(settings), make_run(settings)
    lines = straight.train()
    resumed.trainer.train_from(straight.folder / "checkpoints" / "checkpoint-4")
    assert checksum(merged_weights(resumed.trainer.policy)) == checksum(merged_weights(straight.trainer.policy))
    one, two = (ppo(run).critic.state_dict() for run in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert resumed.metrics()[-1]["value_loss"] == lines[-1]["value_loss"]


def test_a_checkpoint_of_another_critic_is_told(make_run: MakeTrainer) -> None:
    run = make_run({**PPO, "rl.steps": 2})
    run.train()
    other = make_run({**PPO, "rl.steps": 4, "critic.kind": "model"})
    with pytest.raises(ValueError, match=r"critic\.safetensors: no critic of these settings"):
        other.trainer.train_from(newest_checkpoint(run.folder / "checkpoints"))


def test_critic_settings_are_for_ppo(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ConfigError, SystemExit)) as error:
        make_config({"critic.lam": 0.5})
    said = str(error.value) + capsys.readouterr().err
    assert "critic.lam=0.5 is for algo=ppo, and algo=grpo has no critic" in said


@pytest.mark.parametrize("kind", KINDS, ids=["head", "model"])
@pytest.mark.slow
def test_it_learns(make_run: MakeTrainer, world: World, tmp_path: Path, kind: dict[str, Any]) -> None:
    """Users who all want item 5: reward rises, and the critic learns what to expect after a right first code."""
    rows = tuple(Record(f"train:{user}", f"u{user}", (user, user + 1), (5,), (1.0,)) for user in range(4))
    write_world(replace(world, splits={**world.splits, "train": rows}), tmp_path / "shop")
    run = make_run(
        {
            **PPO,
            **kind,
            "data.path": str(tmp_path / "shop"),
            "rewards": [{"reward": "hit"}],
            "rollout.group_size": 16,
            "rl.micro_batch_groups": 4,
            "rl.steps": 40,
            "rl.learning_rate": 0.01,
            "critic.learning_rate": 0.01,
            "rl.prefix_credit": 0.1,
        }
    )
    lines = run.train()
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert len(rewards) == 20
    assert rewards[0] < 0.2 and np.mean(rewards[-3:]) > 0.8
    explained = [line["explained_variance"] for line in lines if "explained_variance" in line]
    assert explained[0] == pytest.approx(0, abs=0.01)
    assert max(explained) > 0.3
