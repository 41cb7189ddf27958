"""Training on slates, restricted rows and top-p: one distribution with the engine, exact gradients, packed or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl.scoring import FORCED
from rollout.data.native import write_world
from rollout.data.world import World
from rollout.sid import onerec_format
from tests.rl.conftest import MakePolicy, MakeTrainer, shop

MARKED = onerec_format((3, 4, 5))
SLATE = {"rollout.items_per_completion": 3, "rl.learning_rate": 1e-3}


@pytest.fixture(scope="module")
def restricted(tmp_path_factory: pytest.TempPathFactory, world: World) -> str:
    """Rows with candidates, rows with excluded items by turns, every third row free."""
    rng, splits = np.random.default_rng(0), {}
    for split, records in world.splits.items():
        rows = []
        for index, record in enumerate(records):
            others = [int(i) for i in rng.permutation(len(world.catalog)) if i not in record.targets]
            candidates = (*record.targets, *others[:9])
            rows.append(replace(record, candidates=candidates) if index % 3 else record)
        splits[split] = tuple(rows)
    folder = tmp_path_factory.mktemp("restricted") / "shop"
    write_world(replace(world, splits=splits), folder)
    return str(folder)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, make_policy: MakePolicy) -> dict[str, Any]:
    """Data and policy of a format with begin and end marks."""
    folder = tmp_path_factory.mktemp("marked") / "shop"
    write_world(shop(MARKED), folder)
    return {"data.path": str(folder), "model.path": str(make_policy(fmt=MARKED))}


SETTINGS: list[Any] = [
    pytest.param({}, id="free"),
    pytest.param({"data.exclude_history": True, "data.on_bad_rows": "skip"}, id="unseen"),
]


@pytest.mark.parametrize("more", SETTINGS)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "rows"])
def test_slates_are_on_policy(
    make_run: MakeTrainer, marked: dict[str, Any], more: dict[str, Any], packing: bool
) -> None:
    """The trainer gives the tokens of a slate the probabilities they were drawn with: the first ratio is 1."""
    run = make_run({**SLATE, **marked, **more, "rl.packing": packing})
    lines = run.train()
    assert max(line["ratio_error"] for line in lines) < 1e-4
    assert all(line["legal_rate"] == 1.0 for line in lines)
    for group in run.fleet.seen[0]:
        for rollout in group.rollouts:
            assert len(set(rollout.sids)) == 3
            assert len(rollout.token_ids) == 3 * 3 + 2 * 2
            if more:
                assert not {i for cluster in rollout.items for i in cluster} & set(group.sample.record.history)


def test_forced_tokens_carry_no_gradient(make_run: MakeTrainer, marked: dict[str, Any]) -> None:
    """Marks have no log-probability and no share in the loss: their advantage may be anything."""
    run = make_run({**SLATE, **marked})
    batch = run.batch()
    run.trainer.current_gradient_accumulation_steps = 1
    forced_BT = batch["places"] == FORCED
    assert forced_BT.sum(dim=1).unique().tolist() == [4]
    assert torch.equal(forced_BT, batch["tool_mask"] == 0)
    losses = []
    for value in (0.0, 100.0):
        run.trainer.model.zero_grad()
        advantages_BT = batch["advantages"][:, None].expand(forced_BT.shape).masked_fill(forced_BT, value)
        loss = run.trainer._compute_loss(run.trainer.model, {**batch, "advantages": advantages_BT})
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in run.trainer.model.parameters() if p.grad is not None])
        losses.append((float(loss.detach()), gradient))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])
    scores = run.trainer.scorer.scores(run.trainer.model, batch)
    assert (scores.logps_BT[forced_BT] == 0).all() and (scores.entropies_BT[forced_BT] == 0).all()


@pytest.mark.parametrize("algo", ["grpo", "ppo", "gspo"])
def test_restricted_rows_train(make_run: MakeTrainer, restricted: str, algo: str) -> None:
    """Candidates bound rollouts and update alike, also of slates."""
    items = 2 if algo == "grpo" else 1
    run = make_run({"algo": algo, "data.path": restricted, "rollout.items_per_completion": items, "rl.sft_coef": 0.1})
    lines = run.train()
    assert max(line["ratio_error"] for line in lines if "ratio_error" in line) < 1e-4
    for groups in run.fleet.seen:
        for group in groups:
            written = {item for rollout in group.rollouts for cluster in rollout.items for item in cluster}
            assert group.sample.record.candidates is None or written <= set(group.sample.record.candidates)


def test_gradient_of_a_slate_is_packed_or_not(make_run: MakeTrainer, marked: dict[str, Any]) -> None:
    gradients = []
    for packing in (True, False):
        run = make_run({**SLATE, **marked, "rl.packing": packing})
        batch, run.trainer.current_gradient_accumulation_steps = run.batch(), 1
        run.trainer._compute_loss(run.trainer.model, batch).backward()
        grads = [p.grad.flatten() for p in run.trainer.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(grads))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-5


def test_top_p_weighs_by_the_narrower_distribution(make_run: MakeTrainer) -> None:
    """The ratio of the first pass is the nucleus' mass, at most 1: what is reported is not hidden."""
    run = make_run({"rollout.top_p": 0.7})
    batch = run.batch()
    logps_BT = run.trainer.scorer.logps(run.trainer.model, batch)
    ratio_BT = (logps_BT - batch["sampler_logps"]).exp()
    assert float(ratio_BT.max()) < 1 + 1e-5
    assert float(ratio_BT.min()) > 0.7 - 1e-5
    assert float(ratio_BT.mean()) < 0.99


def test_slates_learn(make_run: MakeTrainer, world: World, tmp_path: Path) -> None:
    """Targets that are always the same two items rise in the slates, in order of their gain."""
    rows = {
        split: tuple(replace(record, targets=(3, 7), gains=(1.0, 3.0)) for record in records)
        for split, records in world.splits.items()
    }
    write_world(replace(world, splits=rows), tmp_path / "two")
    settings = {"data.path": str(tmp_path / "two"), "rollout.items_per_completion": 2, "rl.steps": 30}
    run = make_run({**settings, "rl.learning_rate": 3e-2, "rewards": [{"reward": "ndcg@2"}]})
    lines = run.train()
    assert np.mean([line["reward"] for line in lines[-5:]]) > 2 * np.mean([line["reward"] for line in lines[:5]])
