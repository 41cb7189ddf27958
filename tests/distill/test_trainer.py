"""Distillation in training: alone, in turn with RL and mixed into it; what it brings, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.check import ConfigError
from distill.trainer import distilling
from rl.batch import slices_of
from rollout.data.problems import DataError
from rollout.hf_engine import load_policy
from rollout.weights import checksum, merged_weights
from tests.rl.conftest import MakePolicy, MakeTrainer, arguments, quiet_environment

ALONE: dict[str, Any] = {
    "distill.every": 1,
    "distill.prompts_per_step": 4,
    "distill.texts_per_prompt": 2,
    "distill.max_tokens": 6,
    "rl.learning_rate": 3e-3,
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "general.json"
    path.write_text(json.dumps([{"prompt": f"question {row}"} for row in range(12)]))
    return str(path)


@pytest.fixture
def settings(prompts: str, make_policy: MakePolicy) -> dict[str, Any]:
    """Distillation alone, from a teacher of one layer less."""
    return {**ALONE, "distill.prompts": prompts, "distill.teacher": str(make_policy(layers=1))}


def test_alone(make_run: MakeTrainer, settings: dict[str, Any]) -> None:
    """The student comes nearer to the teacher; no rollouts are drawn, weights reach the engine before each batch."""
    run = make_run({**settings, "rl.steps": 12, "rl.learning_rate": 1e-2}, trainer_of=distilling)
    lines = run.train()
    assert {call[0] for call in run.fleet.calls} == {"write", "sync"}
    assert [call[1] for call in run.fleet.calls if call[0] == "write"] == list(range(12))
    gaps = [line["distill/divergence"] for line in lines]
    assert np.mean(gaps[-3:]) < 0.8 * np.mean(gaps[:3])
    assert all(line["distill/tokens"] > 0 and 0 <= line["distill/item_tokens"] <= 1 for line in lines)
    assert all("reward" not in line and line["seconds/texts"] > 0 for line in lines)


def test_in_turn(make_run: MakeTrainer, settings: dict[str, Any]) -> None:
    run = make_run({**settings, "distill.every": 3, "rl.steps": 6}, trainer_of=distilling)
    lines = run.train()
    assert ["reward" in line for line in lines] == [True, True, False, True, True, False]
    assert ["distill/divergence" in line for line in lines] == [False, False, True, False, False, True]
    drawn = [call[0] for call in run.fleet.calls if call[0] != "sync"]
    assert drawn == ["generate", "generate", "write"] * 2


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_mixed(make_run: MakeTrainer, settings: dict[str, Any], algo: str) -> None:
    """The gradient is that of RL plus the weight times that of the texts."""
    gradients = []
    for weight in (0.5, 1.5):
        more = {"algo": algo, "distill.every": 0, "distill.weight": weight, "rl.steps": 4}
        run = make_run({**settings, **more}, trainer_of=distilling)
        trainer, batch = run.trainer, run.batch()
        assert batch["text_ids"].shape[0] == 8
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, batch).backward()
        found = [p.grad.flatten().clone() for p in trainer.policy.parameters() if p.grad is not None]
        trainer.model.zero_grad()
        trainer.distiller.loss(trainer.model, batch, torch.device("cpu")).loss.backward()
        texts = [p.grad.flatten().clone() for p in trainer.policy.parameters() if p.grad is not None]
        gradients.append((torch.cat(found), torch.cat(texts)))
    (first, texts), (second, again) = gradients
    torch.testing.assert_close(texts, again)
    assert float(texts.norm()) > 0
    torch.testing.assert_close(second - first, texts, atol=1e-5 * float(texts.norm()), rtol=1e-4)


@pytest.mark.parametrize("item_tokens", ["leave_out", "punish"])
def test_micro_batches_change_nothing(make_run: MakeTrainer, settings: dict[str, Any], item_tokens: str) -> None:
    """The gradient of a batch is that of its slices, however few tokens one of them counts."""
    run = make_run({**settings, "distill.item_tokens": item_tokens}, trainer_of=distilling)
    batch, gradients = run.batch(), []
    for slices in (1, 4):
        run.trainer.model.zero_grad()
        parts = slices_of(batch, slices)
        assert [len(part["text_ids"]) for part in parts] == [8 // slices] * slices
        losses = [run.trainer._compute_loss(run.trainer.model, part) for part in parts]
        sum(losses).backward()  # type: ignore[union-attr]
        gradients.append(torch.cat([p.grad.flatten() for p in run.trainer.policy.parameters() if p.grad is not None]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5


def test_resumed_is_uninterrupted(make_run: MakeTrainer, settings: dict[str, Any]) -> None:
    more = {**settings, "distill.every": 2, "rl.steps": 4, "output.checkpoint_every": 2}
    whole = make_run(more, trainer_of=distilling)
    whole.train()
    resumed = make_run(more, start_at=2, trainer_of=distilling)
    resumed.trainer.train_from(whole.folder / "checkpoints" / "checkpoint-2")
    assert checksum(merged_weights(resumed.trainer.policy)) == checksum(merged_weights(whole.trainer.policy))


def test_the_base_teaches(make_run: MakeTrainer, settings: dict[str, Any]) -> None:
    """At the start the student is its base: no divergence; RL takes it away, and that is seen."""
    more = {**settings, "distill.every": 2, "distill.teacher": None, "rl.steps": 6, "rl.learning_rate": 3e-2}
    del more["distill.teacher"]
    lines = make_run(more, trainer_of=distilling).train()
    gaps = [line["distill/divergence"] for line in lines if "distill/divergence" in line]
    assert gaps[0] > 0
    first = make_run({**more, "distill.every": 1, "rl.steps": 1}, trainer_of=distilling).train()
    assert first[0]["distill/divergence"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_recommendations_are_held(make_run: MakeTrainer, settings: dict[str, Any], lora: bool) -> None:
    """Its gradient is that of the mean k3 to the start on the rollouts, whatever the slices; 0 at the start."""
    more = {**settings, "distill.recommendation": 0.7, "lora.enabled": lora, "rl.steps": 3, "rl.learning_rate": 3e-2}
    run = make_run(more, trainer_of=distilling)
    trainer, gradients = run.trainer, []
    assert float(trainer.held_loss(trainer.model, run.batch()).detach()) == pytest.approx(0, abs=1e-9)
    start = merged_weights(trainer.policy)
    lines = run.train()
    assert lines[0]["distill/recommendation"] == pytest.approx(0, abs=1e-9)
    assert lines[2]["distill/recommendation"] > 1e-6
    assert all("legal_rate" in line and "reward" not in line for line in lines)
    batch = run.batch()
    now, then = (trainer.scorer.scores(model, batch).logps_BT for model in (trainer.model, _with(trainer, start)))
    k3 = ((then.detach() - now).exp() - (then.detach() - now) - 1).mean()
    texts = trainer.distiller.loss(trainer.model, batch, torch.device("cpu")).loss
    expected = texts + 0.7 * k3
    assert float(k3.detach()) > 1e-6
    trainer.model.zero_grad()
    expected.backward()
    gradients.append(_gradient(trainer))
    for slices in (1, 4):
        trainer.model.zero_grad()
        losses = [trainer._compute_loss(trainer.model, part) for part in slices_of(batch, slices)]
        assert float(sum(losses)) == pytest.approx(float(expected), rel=1e-5)
        sum(losses).backward()  # type: ignore[union-attr]
        gradients.append(_gradient(trainer))
    for found in gradients[1:]:
        assert float((found - gradients[0]).norm() / gradients[0].norm()) < 1e-4


def _gradient(trainer: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])


def _with(trainer: Any, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A model of its own with these weights."""
    model = load_policy(trainer.task.model_path, dtype="float32")
    model.load_state_dict(weights, strict=False)
    return model


def test_what_does_not_go(make_run: MakeTrainer, settings: dict[str, Any], prompts: str, tmp_path: Path) -> None:
    for more in (
        {"distill.prompts": ""},
        {"distill.every": 0, "distill.weight": 0},
        {"distill.weight": 0.1},
        {"distill.prompts_per_step": 5},
        {"rollout.max_staleness": 1, "distill.every": 2},
        {"algo": "pl", "distill.every": 0, "distill.weight": 1},
        {"lora.enabled": False, "distill.teacher": None},
        {"distill.recommendation": 1.0, "distill.every": 2},
        {"distill.recommendation": 1.0, "rollout.sampler": "unique"},
        {"distill.recommendation": 1.0, "rollout.top_p": 0.9},
        {"distill.teachers": 1},
        {"distill.teachers": -1, "distill.divergence": "top_k"},
    ):
        with pytest.raises((ConfigError, SystemExit)):
            make_run({**settings, **more}, trainer_of=distilling)
    with pytest.raises(ValueError, match="distill.prompts_per_step=16, but .* has 12 usable prompts"):
        make_run({**settings, "distill.prompts_per_step": 16}, trainer_of=distilling)
    with pytest.raises(ValueError, match="distill.teacher=.*nowhere: no model and tokenizer could be read from it"):
        make_run({**settings, "distill.teacher": str(tmp_path / "nowhere")}, trainer_of=distilling)
    (tmp_path / "bad.json").write_text(json.dumps([{"prompt": "x " * 400}, {"answer": "y"}]))
    with pytest.raises(DataError, match=r"bad\.json:1: missing-field: neither messages, prompt nor instruction"):
        make_run({**settings, "distill.prompts": str(tmp_path / "bad.json")}, trainer_of=distilling)


@pytest.mark.ray
@pytest.mark.slow
def test_command_line(settings: dict[str, Any], data: Path, make_policy: MakePolicy, tmp_path: Path) -> None:
    """`python -m distill.train` from the shell, engines and teachers in Ray; `rl.train` says where distillation is."""
    more = {
        "model.path": str(make_policy()), "data.path": str(data), "rollout.engine": "hf", "rollout.group_size": 4,
        "rollout.cpus_per_engine": 0.1, "ray.trainer_cpus": 0.1, "rl.steps": 2, "rl.prompts_per_step": 4,
        "rl.micro_batch_groups": 2, "data.rl_users": 0, "lora.r": 4, "eval.beam_width": 8, "eval.bootstrap": 20,
        "eval.unconstrained_samples": 4, "output_dir": str(tmp_path / "run"),
        "distill.teachers": 1, "distill.divergence": "top_k", "distill.top_k": 9, "distill.weight": 0.5,
    }  # fmt: skip
    given = arguments({**settings, **more, "distill.every": 2})
    environment = quiet_environment("distill")
    for module, expected in (("rl.train", 1), ("distill.train", 0)):
        done = subprocess.run(
            [sys.executable, "-m", module, *given], capture_output=True, text=True, env=environment, timeout=240
        )
        said = done.stdout + done.stderr
        assert (done.returncode != 0) == bool(expected), said[-2000:]
        if expected:
            assert "`python -m distill.train` takes these settings, and distils" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["reward" in line for line in lines] == [True, False]
    assert all(line["distill/divergence"] > 0 for line in lines)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and "after" in summary
