"""`--algo pl`: rankings of candidates and of the catalogue, their loss, and that they learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.check import ConfigError
from rl.candidates import candidate_sids
from rl.evaluate import evaluate
from rl.progress import Progress
from rl.trl_ranking import RankingTrainer
from rollout.data.native import write_world
from rollout.data.problems import DataError
from rollout.data.world import World
from rollout.types import Record
from tests.rl.conftest import MakeConfig, MakeTrainer, Run
from tests.rl.test_trainer import gap, shake, trained, trie_logps

PL: dict[str, Any] = {"algo": "pl", "rollout.group_size": 6, "rl.ranking_length": 5}


def shop_with_candidates(world: World, folder: Path, mixed: bool) -> Path:
    """Every user (or every second) ranks four to seven items of their own, the target among them."""
    rng = np.random.default_rng(1)
    splits = {}
    for split, records in world.splits.items():
        rows = []
        for number, record in enumerate(records):
            others = [item for item in rng.permutation(24).tolist() if item not in record.targets]
            chosen = tuple(sorted([*others[: 3 + number % 4], *record.targets]))
            rows.append(record if mixed and number % 2 else replace(record, candidates=chosen))
        splits[split] = tuple(rows)
    write_world(replace(world, splits=splits), folder)
    return folder


@pytest.fixture
def mixed(world: World, tmp_path: Path) -> str:
    return str(shop_with_candidates(world, tmp_path / "mixed", mixed=True))


def item_logp(run: Run, prompt: tuple[int, ...], sid: int) -> torch.Tensor:
    path = run.trainer.task.decoder.path_of(sid)
    return trie_logps(run, run.trainer.policy, prompt, path).sum()


def ranking_logp(run: Run, group: Any, rollout: Any) -> torch.Tensor:
    """Item by item: the chance of each among what is left."""
    decoder = run.trainer.task.decoder
    scores = torch.stack([item_logp(run, group.sample.prompt_ids, sid) for sid in rollout.sids])
    total = torch.zeros(())
    for place in range(len(scores)):
        if group.sample.record.candidates is not None:
            total = total + scores[place] - torch.logsumexp(scores[place:], dim=0)
        else:
            total = total + scores[place] - torch.log(1 - scores[:place].exp().sum())
    assert len(rollout.sids) == (
        5 if group.sample.record.candidates is None else len(candidate_sids(group.sample, decoder))
    )
    return total


def drawn_groups(run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], dict[str, torch.Tensor]]:
    seen: list[Any] = []
    score = run.trainer.score

    def watch(groups: list[Any]) -> Any:
        seen.extend(groups)
        return score(groups)

    monkeypatch.setattr(run.trainer, "score", watch)
    return seen, run.batch()


@pytest.mark.parametrize("micro", [4, 2])
def test_loss_and_gradient_are_those_of_the_formula(
    make_run: MakeTrainer, mixed: str, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    """Off-policy: -mean(min(ρA, clip(ρ)A)), ρ of whole rankings, candidates and catalogue in one batch."""
    run = make_run({**PL, "data.path": mixed, "rl.micro_batch_groups": micro, "rollout.temperature": 0.9})
    trainer = run.trainer
    assert isinstance(trainer, RankingTrainer)
    shake(trainer.policy)
    run.fleet.version = -1
    groups, batch = drawn_groups(run, monkeypatch)
    assert {group.sample.record.candidates is None for group in groups} == {True, False}
    old = torch.stack([ranking_logp(run, g, r) for g in groups for r in g.rollouts]).detach()
    torch.testing.assert_close(batch["sampler_ranking_logps"].reshape(-1).float(), old, atol=1e-4, rtol=1e-4)

    shake(trainer.policy, 0.03)
    from rl.batch import slices_of

    trainer.current_gradient_accumulation_steps = 4 // micro
    trainer.model.zero_grad()
    for part in slices_of(batch, 4 // micro):
        trainer.compute_loss(trainer.model, part).backward()
    found = {n: p.grad.clone() for n, p in trainer.policy.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    rewards = np.array([one.total for one in trainer.task.rewards.score(groups)])
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / 5
    advantages = torch.from_numpy((rewards - others) / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)
    new = torch.stack([ranking_logp(run, g, r) for g in groups for r in g.rollouts])
    ratio = (new - old).exp()
    assert ratio.max() > 1.2 or ratio.min() < 0.8
    (-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()).backward()
    expected = {n: p.grad for n, p in trainer.policy.named_parameters() if p.grad is not None}
    assert gap(found, expected) <= 2e-4


def test_rankings_are_slates_in_drawn_order(make_run: MakeTrainer, mixed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run({**PL, "data.path": mixed})
    groups, batch = drawn_groups(run, monkeypatch)
    for group, advantages in zip(groups, batch["advantages"].view(4, 6).tolist(), strict=True):
        assert len(group) == 6
        (target,) = group.sample.targets
        for rollout in group.rollouts:
            assert len(set(rollout.sids)) == len(rollout.sids)
            if group.sample.record.candidates is not None:
                assert sorted(rollout.sids) == candidate_sids(group.sample, run.trainer.task.decoder)
                assert {i for cluster in rollout.items for i in cluster} == set(group.sample.record.candidates)
        ndcg = [
            sum(
                (target in cluster) / len(cluster) / np.log2(2 + rank)
                for rank, cluster in enumerate(rollout.items)
                if rank < 10
            )
            for rollout in group.rollouts
        ]
        assert np.argsort(ndcg, kind="stable").tolist() == np.argsort(advantages, kind="stable").tolist()
    orders = {tuple(rollout.sids) for group in groups for rollout in group.rollouts}
    assert len(orders) > 12


def test_on_policy_ratio_is_one_and_passes_move_it(make_run: MakeTrainer, mixed: str) -> None:
    lines = make_run({**PL, "data.path": mixed, "rl.steps": 4, "rl.epochs_per_batch": 2}).train()
    assert [line.get("ratio_error", 0.0) <= 1e-4 for line in lines] == [True] * 4
    assert ["ratio_error" in line for line in lines] == [True, False, True, False]
    assert all(line.get("legal_rate", 1.0) == 1.0 for line in lines)


@pytest.mark.parametrize("candidates", [True, False], ids=["candidates", "catalogue"])
@pytest.mark.slow
def test_it_learns(make_run: MakeTrainer, world: World, tmp_path: Path, candidates: bool) -> None:
    """Four users who all want item 5: it comes to stand first in nearly every ranking."""
    chosen = (1, 3, 5, 8, 11, 17, 20) if candidates else None
    rows = tuple(Record(f"train:{user}", f"u{user}", (user, user + 1), (5,), (1.0,)) for user in range(4))
    rows = tuple(replace(row, candidates=chosen) for row in rows)
    write_world(replace(world, splits={**world.splits, "train": rows}), tmp_path / "shop")
    run = make_run({**PL, "data.path": str(tmp_path / "shop"), "rl.steps": 25, "rl.learning_rate": 0.01})
    rewards = [line["reward"] for line in run.train()]
    assert rewards[0] < 0.7
    assert np.mean(rewards[-3:]) > 0.9


def test_evaluation_ranks_the_candidates(make_run: MakeTrainer, mixed: str) -> None:
    """HR and NDCG of rows with candidates are those of their exact ranking, the others' of the beam."""
    run = make_run({**PL, "data.path": mixed})
    shake(run.trainer.policy)
    result = evaluate(run.trainer.policy, run.trainer.task, run.config, "test", Progress()).result
    catalog, hits = run.trainer.task.decoder.catalog, []
    for sample in run.trainer.task.samples["test"]:
        sids = list(range(len(catalog.sids_SL)))
        if sample.record.candidates is not None:
            sids = candidate_sids(sample, run.trainer.task.decoder)
        scores = {sid: float(item_logp(run, sample.prompt_ids, sid).detach()) for sid in sids}
        best = max(scores, key=lambda sid: scores[sid])
        hits.append(np.mean([item in sample.targets for item in catalog.items_of_sid(best)]))
    assert result.values["hr@1"] == pytest.approx(np.mean(hits))


@pytest.mark.slow
def test_resume(make_run: MakeTrainer, mixed: str) -> None:
    settings = {**PL, "data.path": mixed, "rl.steps": 4, "output.checkpoint_every": 2}
    straight, resumed = make_run(settings), make_run(settings)
    straight.train()
    resumed.trainer.train_from(straight.folder / "checkpoints" / "checkpoint-2")
    one, two = trained(straight), trained(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rl.kl_coef": 0.1}, "rl.kl_coef=0.1 has no meaning for whole rankings"),
        ({"rl.sft_coef": 0.1}, "rl.sft_coef=0.1 has no meaning for whole rankings"),
        ({"rollout.sampler": "sample"}, "rollout.sampler=sample must be unique"),
        ({"algo": "grpo"}, "rl.ranking_length=5 is for algo=pl"),
    ],
)
def test_settings_that_do_not_fit(
    make_config: MakeConfig, settings: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ConfigError, SystemExit)) as error:
        make_config({**PL, **settings})
    assert says in str(error.value) + capsys.readouterr().err


def test_rows_that_do_not_fit(make_run: MakeTrainer, world: World, mixed: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Sids may be recommended, and rollout.group_size=8 different ones are asked"):
        make_run({"data.path": mixed, "rollout.sampler": "unique", "rollout.group_size": 8})
    first, *others = world.splits["train"]
    rows = (replace(first, targets=(5,), gains=(1.0,), candidates=(0, 1)), *others)
    write_world(replace(world, splits={**world.splits, "train": rows}), tmp_path / "bad")
    with pytest.raises(DataError, match="none of the targets is among the candidates"):
        make_run({**PL, "data.path": str(tmp_path / "bad")})
    with pytest.raises(ValueError, match=r"rl\.ranking_length=30 distinct items are asked of a catalogue of 23 Sids"):
        make_run({**PL, "rl.ranking_length": 30})
