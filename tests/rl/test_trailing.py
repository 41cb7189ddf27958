"""Weights that follow the policy: the reference, and the running average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rl.recorder import newest_checkpoint
from rl.trailing import Reference, TrailingWeights
from rollout.weights import checksum, merged_weights
from tests.rl.conftest import MakeTrainer


def test_follow_by_hand() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(8.0)
    trailing = TrailingWeights(model, 0.25)
    model.weight.data.fill_(0.0)
    trailing.follow()
    trailing.follow()
    assert trailing.weights["weight"].item() == pytest.approx(8 * 0.75**2)
    with trailing.shown():
        assert model.weight.item() == pytest.approx(4.5)
        assert trailing.weights["weight"].item() == 0.0
    assert model.weight.item() == 0.0


def test_swap_keeps_the_optimizers_parameters() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trailing = TrailingWeights(model, 0.5)
    trailing.swap()
    model(torch.ones(1, 2)).sum().backward()
    before = model.bias.detach().clone()
    optimizer.step()
    assert torch.equal(model.bias, before - 1)


def test_a_reference_that_stays_needs_no_second_adapter(make_run: MakeTrainer) -> None:
    stays = make_run({"rl.kl_coef": 0.1}).trainer.reference
    assert stays is not None and stays.trailing is None
    follows = make_run({"rl.kl_coef": 0.1, "rl.sync_ref_every": 1}).trainer.reference
    assert follows is not None and follows.trailing is not None
    assert all("lora" in name for name in follows.trailing.weights)
    assert make_run().trainer.reference is None


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_reference_follows(make_run: MakeTrainer, lora: bool) -> None:
    """With mixup 1 the reference of step 3 is the policy after step 2: the KL of a step's rollouts is zero again."""
    run = make_run(
        {
            "rl.kl_coef": 0.1,
            "rl.sync_ref_every": 2,
            "rl.sync_ref_mixup": 1.0,
            "rl.steps": 4,
            "lora.enabled": lora,
            "rl.learning_rate": 0.01 if lora else 1e-3,
        }
    )
    kls = [line["kl"] for line in run.train()]
    assert kls[0] == pytest.approx(0, abs=1e-6) and kls[2] == pytest.approx(0, abs=1e-6)
    assert kls[1] > 1e-5 and kls[3] > 1e-5


def test_reference_of_a_plain_model_is_a_copy() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    reference = Reference(model, every=0, mixup=0.5)
    start = model.weight.item()
    model.weight.data.fill_(9.0)
    reference.after_step(1)
    with reference.shown():
        assert model.weight.item() == start


SETTINGS: dict[str, Any] = {"rl.steps": 4, "output.checkpoint_every": 2, "rl.learning_rate": 0.01}


@pytest.mark.parametrize(
    "more",
    [{"rl.kl_coef": 0.1, "rl.sync_ref_every": 2, "rl.sync_ref_mixup": 0.5}, {"rl.average_decay": 0.5}],
    ids=["reference", "average"],
)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.slow
def test_resumed_is_uninterrupted(make_run: MakeTrainer, more: dict[str, Any], lora: bool) -> None:
    settings = {**SETTINGS, **more, "lora.enabled": lora}
    straight, resumed = make_run(settings), make_run(settings)
    straight.trainer.train_from(None)
    resumed.trainer.train_from(straight.folder / "checkpoints" / "checkpoint-2")
    assert checksum(merged_weights(resumed.trainer.policy)) == checksum(merged_weights(straight.trainer.policy))
    assert resumed.metrics()[-1]["loss"] == straight.metrics()[-1]["loss"]


def test_a_checkpoint_without_the_reference_is_told(make_run: MakeTrainer) -> None:
    run = make_run(SETTINGS)
    run.train()
    other = make_run({**SETTINGS, "rl.average_decay": 0.9})
    with pytest.raises(ValueError, match=r"holds no average\.safetensors.*rl\.average_decay"):
        other.trainer.train_from(newest_checkpoint(run.folder / "checkpoints"))


def test_average_of_the_steps_is_kept(make_run: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decay d after two steps: d² · start + (1 - d)(d · first + second), seen from the weights of each step."""
    run = make_run({**SETTINGS, "rl.steps": 2, "rl.average_decay": 0.7, "output.checkpoint_every": 1})
    assert run.trainer.average is not None
    start = {name: weight.clone() for name, weight in run.trainer.average.weights.items()}
    seen: list[dict[str, torch.Tensor]] = []
    after_step = run.trainer.after_step

    def watch(step: int) -> None:
        seen.append({n: p.detach().clone() for n, p in run.trainer.policy.named_parameters() if n in start})
        after_step(step)

    monkeypatch.setattr(run.trainer, "after_step", watch)
    run.trainer.train_from(None)
    kept = dict(run.trainer.policy.named_parameters())
    for name, first in start.items():
        expected = 0.49 * first + 0.3 * (0.7 * seen[0][name] + seen[1][name])
        torch.testing.assert_close(kept[name].detach(), expected)
    loaded = make_run({**SETTINGS, "rl.steps": 2, "rl.average_decay": 0.7, "output.checkpoint_every": 1})
    loaded.trainer.train_from(newest_checkpoint(run.folder / "checkpoints"))
    assert checksum(merged_weights(loaded.trainer.policy)) == checksum(merged_weights(run.trainer.policy))


@pytest.mark.slow
def test_valid_is_evaluated_on_the_average(make_run: MakeTrainer) -> None:
    """With a decay near 1 the average has not moved, whatever the policy does."""
    far = {**SETTINGS, "rl.learning_rate": 0.1, "eval.every": 4}
    still, moved = make_run({**far, "rl.average_decay": 1 - 1e-9}), make_run(far)
    one, two = (run.train()[-1]["valid/ndcg@10"] for run in (still, moved))
    unmoved = make_run({**far, "rl.learning_rate": 1e-12})
    assert one == pytest.approx(unmoved.train()[-1]["valid/ndcg@10"])
    assert one != two


def test_no_reference_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reference\.safetensors.*rl\.sync_ref_every"):
        Reference(torch.nn.Linear(1, 1), every=1, mixup=0.5).load(tmp_path)
