"""Rollouts drawn ahead of their step: how old they are, that the ratio corrects for it, that nothing gets lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.check import ConfigError
from rl.recorder import newest_checkpoint
from rollout.data.native import write_world
from rollout.data.world import World
from rollout.types import Record
from rollout.weights import checksum, merged_weights
from tests.rl.conftest import MakeTrainer

SETTINGS: dict[str, Any] = {"rl.steps": 5, "rl.learning_rate": 3e-3}


@pytest.mark.parametrize(
    ("staleness", "passes", "expected"),
    [(0, 1, [0, 0, 0, 0, 0]), (1, 1, [0, 1, 1, 1, 1]), (2, 1, [0, 1, 2, 2, 2]), (1, 2, [0, 2, 2])],
)
def test_how_old_rollouts_are(make_run: MakeTrainer, staleness: int, passes: int, expected: list[int]) -> None:
    """Counted in versions; the first batch is always fresh, and no batch older than allowed."""
    more = {"rollout.max_staleness": staleness, "rl.epochs_per_batch": passes, "rl.steps": len(expected) * passes}
    run = make_run({**SETTINGS, **more})
    lines = [line for line in run.train() if "staleness" in line]
    assert [line["staleness"] for line in lines] == expected
    assert [line["policy_version"] for line in lines] == [step * passes - age for step, age in enumerate(expected)]
    # Only rollouts of the very weights that are updated have a ratio of 1 to check.
    fresh = [line["step"] for line in lines if "ratio_error" in line]
    assert fresh == [line["step"] for line, age in zip(lines, expected, strict=True) if age == 0]
    drawn = [call for call in run.fleet.calls if call[0] == "generate"]
    assert len(drawn) == len(expected), "nothing is drawn that is not used"


def test_the_same_prompts_and_seeds_in_the_same_order(make_run: MakeTrainer) -> None:
    """Drawn ahead or not, a step has its prompts and its seed, over several passes through the rows."""
    seen = []
    for staleness in (0, 2):
        steps = {"rl.steps": 14, "rl.prompts_per_step": 20, "rl.micro_batch_groups": 20}
        run = make_run({**SETTINGS, **steps, "rollout.max_staleness": staleness})
        run.train()
        drawn = [call for call in run.fleet.calls if call[0] == "generate"]
        seen.append(([[g.sample.record.source for g in groups] for groups in run.fleet.seen], [c[2] for c in drawn]))
    assert seen[0] == seen[1]
    assert len({tuple(rows) for rows in seen[0][0]}) == 14


def test_the_ratio_is_to_the_weights_they_were_drawn_from(make_run: MakeTrainer) -> None:
    """The second batch was drawn by the first weights: its loss has their log-probabilities in the denominator."""
    run = make_run({**SETTINGS, "rollout.max_staleness": 1, "rl.steps": 2})
    batches: list[dict[str, Any]] = []
    pack = run.trainer.pack
    run.trainer.pack = lambda groups: batches.append(pack(groups)) or batches[-1]  # type: ignore[method-assign, func-returns-value]
    before = {k: v.clone() for k, v in merged_weights(run.trainer.policy).items()}
    run.train()
    torch.testing.assert_close(batches[1]["old_per_token_logps"], batches[1]["sampler_logps"])
    run.fleet.engine.load_weights(before, 9)
    model = run.fleet.engine.model
    first = run.trainer.scorer.logps(model, batches[1])
    torch.testing.assert_close(first, batches[1]["sampler_logps"], atol=1e-4, rtol=0)
    now = run.trainer.scorer.logps(run.trainer.model, batches[1])
    assert float((now - first).abs().max()) > 1e-3


@pytest.mark.parametrize("staleness", [1, 2])
def test_resumed_is_uninterrupted(make_run: MakeTrainer, staleness: int) -> None:
    """What was under way at a checkpoint is written with it."""
    settings = {**SETTINGS, "rollout.max_staleness": staleness, "output.checkpoint_every": 2, "rl.steps": 4}
    whole = make_run(settings)
    whole.train()
    resumed = make_run(settings, start_at=2)
    resumed.fleet.version = resumed.fleet.engine.policy_version = 0
    resumed.trainer.train_from(whole.folder / "checkpoints" / "checkpoint-2")
    assert checksum(merged_weights(resumed.trainer.policy)) == checksum(merged_weights(whole.trainer.policy))
    other = make_run({**settings, "rollout.max_staleness": 0})
    other.train()
    with pytest.raises(ValueError, match="holds no rollouts ahead"):
        make_run(settings).trainer.train_from(newest_checkpoint(other.folder / "checkpoints").parent / "checkpoint-2")  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["grpo", "ppo", "dapo"])
def test_it_learns(make_run: MakeTrainer, world: World, tmp_path: Path, algo: str) -> None:
    """Four users who all want item 5: after some steps most rollouts are it, though each batch is one step old."""
    rows = tuple(Record(f"train:{user}", f"u{user}", (user, user + 1), (5,), (1.0,)) for user in range(4))
    write_world(replace(world, splits={**world.splits, "train": rows}), tmp_path / "shop")
    settings = {"algo": algo, "data.path": str(tmp_path / "shop"), "rewards": [{"reward": "hit"}]}
    steps = {"rl.steps": 40 if algo == "ppo" else 20, "rl.micro_batch_groups": 4, "rollout.group_size": 16}
    lines = make_run({**settings, **steps, "rl.learning_rate": 0.01, "rollout.max_staleness": 1}).train()
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert np.mean(rewards[-3:]) > max(0.6, 3 * rewards[0])


def test_algorithms_that_cannot(make_run: MakeTrainer) -> None:
    for algo in ("gpg", "pl"):
        with pytest.raises((ConfigError, SystemExit)):
            make_run({"algo": algo, "rollout.max_staleness": 1})
