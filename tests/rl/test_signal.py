"""Signal where hits are sparse: targets beside the rollouts (SFT term) and among them (injection)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.protocol import ScoredGroup
from rl.injection import draw_targets, inject_targets
from rollout.data.native import write_world
from rollout.data.world import World
from rollout.types import Record, RolloutGroup, Sample
from tests.rl.conftest import MakeTrainer, Run
from tests.rl.test_trainer import SGD, gap, shake, trie_logps, watch_gradients


def gradient_of(run: Run) -> dict[str, torch.Tensor]:
    gradients = watch_gradients(run.trainer)
    run.train()
    return gradients[0]


def target_path(run: Run, sample: Sample) -> tuple[int, ...]:
    (item,) = sample.targets
    decoder = run.trainer.task.decoder
    return tuple(decoder.path_of(int(decoder.catalog.sid_index_N[item])))


# SFT term -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_sft_term_adds_the_targets_nll(make_run: MakeTrainer, packing: bool, lora: bool) -> None:
    """Gradient with the term = gradient without it + coefficient · gradient of the mean NLL, prompt by prompt."""
    common = {"rl.steps": 1, "rl.packing": packing, "lora.enabled": lora, **SGD}
    runs = [make_run({**common, "rl.sft_coef": coef}) for coef in (0.0, 0.7)]
    for run in runs:
        shake(run.trainer.policy)
        run.fleet.version = -1
    plain, both = (gradient_of(run) for run in runs)

    other = make_run(common)
    shake(other.trainer.policy)
    samples = [group.sample for group in runs[1].fleet.seen[0]]
    nll = -torch.stack(
        [trie_logps(other, other.trainer.policy, s.prompt_ids, target_path(other, s)).sum() for s in samples]
    ).mean()
    nll.backward()
    alone = {n: p.grad for n, p in other.trainer.policy.named_parameters() if p.grad is not None}
    assert gap(both, {name: plain[name] + 0.7 * alone[name] for name in plain}) <= 1e-4
    (line,) = runs[1].metrics()
    assert line["target_nll"] == pytest.approx(float(nll), rel=1e-4)
    (without,) = runs[0].metrics()
    assert line["loss"] - without["loss"] == pytest.approx(0.7 * float(nll), rel=1e-3)


def test_sft_term_learns_what_reward_cannot_find(make_run: MakeTrainer, world: World, tmp_path: Path) -> None:
    """No reward at all: the term alone makes the target likely."""
    rows = tuple(Record(f"train:{user}", f"u{user}", (user, user + 1), (5,), (1.0,)) for user in range(4))
    write_world(replace(world, splits={**world.splits, "train": rows}), tmp_path / "shop")
    settings = {
        "data.path": str(tmp_path / "shop"),
        "rewards": [{"reward": "validity"}],
        "rl.steps": 15,
        "rl.learning_rate": 0.01,
        "rl.sft_coef": 1.0,
    }
    lines = make_run(settings).train()
    assert lines[0]["zero_signal_groups"] == 1.0
    assert lines[0]["target_nll"] > 2 and lines[-1]["target_nll"] < 0.5


def test_targets_are_drawn_by_gain() -> None:
    sample = Sample(Record("r:1", "", (), (3, 8), (1.0, 3.0)), (1,))
    drawn = [draw_targets([sample], step)[0] for step in range(2000)]
    assert np.mean(np.array(drawn) == 8) == pytest.approx(0.75, abs=0.03)
    others = [Sample(Record(f"r:{row}", "", (), (3, 8), (1.0, 3.0)), (1,)) for row in range(20)]
    assert draw_targets(others, 12)[7:] == draw_targets(others[7:], 12)  # whatever else is asked for
    assert draw_targets(others, 12) != draw_targets(others, 13)


# Injection ------------------------------------------------------------------------------------------------------------


def hits(group: RolloutGroup) -> list[bool]:
    return [any(item in group.sample.targets for items in r.items for item in items) for r in group.rollouts]


def test_groups_without_a_hit_get_their_target(make_run: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run({"rl.inject_targets": True, "rl.prompts_per_step": 16, "rollout.temperature": 0.8})
    scored: list[ScoredGroup] = []
    score = run.trainer.score

    def watch(groups: list[RolloutGroup]) -> list[ScoredGroup]:
        scored.extend(score(groups))
        return scored

    monkeypatch.setattr(run.trainer, "score", watch)
    batch = run.batch()
    (drawn,) = run.fleet.seen
    injected = 0
    for group, given in zip(drawn, scored, strict=True):
        rollouts = given.group.rollouts
        assert any(hits(given.group))
        if any(hits(group)):
            assert given.group == group
            continue
        injected += 1
        assert rollouts[:-1] == group.rollouts[:-1]
        assert hits(given.group)[-1]
        assert rollouts[-1].token_ids == target_path(run, group.sample)
        expected = trie_logps(run, run.trainer.policy, group.sample.prompt_ids, rollouts[-1].token_ids)
        assert rollouts[-1].logps_sampler == pytest.approx(expected.tolist(), abs=1e-5)
        assert rollouts[-1].policy_version == group.policy_version
    assert 0 < injected < 16
    assert run.trainer._metrics["train"]["injected_targets"] == [injected]
    advantages = batch["advantages"].view(16, -1)
    assert all(row.max() > 0 for row in advantages)


def test_injection_starts_at_ratio_one(make_run: MakeTrainer) -> None:
    lines = make_run({"rl.inject_targets": True, "rl.steps": 2}).train()
    assert all(line["ratio_error"] <= 1e-5 for line in lines)


def test_nothing_to_inject_is_nothing_done() -> None:
    def never(_: Any) -> np.ndarray:
        raise AssertionError("no log-probabilities are needed")

    assert inject_targets([], [], None, never) == ([], 0)  # type: ignore[arg-type]


# Prefix credit --------------------------------------------------------------------------------------------------------


def test_prefix_credit_gives_each_token_the_advantage_of_what_is_to_come(make_run: MakeTrainer) -> None:
    """GRPO's formula token by token, on reward-to-go; the last token's is that of the reward alone."""
    run = make_run({"rl.prefix_credit": 0.4, "rollout.group_size": 8, "rewards": [{"reward": "hit"}]})
    batch = run.batch()
    (groups,) = run.fleet.seen
    codes = run.trainer.task.decoder.catalog.codes_NL
    found = batch["advantages"].view(len(groups), 8, 3).numpy()
    for group, total, advantages in zip(groups, run.trainer.score(groups), found, strict=True):
        (target,) = group.sample.targets
        to_go = np.zeros((8, 3))
        for row, rollout in enumerate(group.rollouts):
            code = run.trainer.task.decoder.catalog.sids_SL[rollout.sids[0]]
            paid = [0.4 * bool((code[: level + 1] == codes[target][: level + 1]).all()) for level in range(2)]
            earned = [*paid, total.total[row]]
            to_go[row] = [sum(earned[token:]) for token in range(3)]
        expected = (to_go - to_go.mean(axis=0)) / (to_go.std(axis=0, ddof=1) + 1e-4)
        np.testing.assert_allclose(advantages, expected, atol=1e-5)
    assert np.abs(found).max() > 0
    lines = run.train()
    assert all(np.isfinite(line["loss"]) for line in lines)
