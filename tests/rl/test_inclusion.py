"""The gradient from items drawn without replacement: unbiased, by brute force over a small catalogue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from configs.check import ConfigError
from rl.advantages import inclusion_advantages
from rollout.decode import Decoder
from rollout.hf_engine import HFEngine
from rollout.support import TorchTrie
from rollout.types import Sample, Sampling
from tests.rl.conftest import MakeTrainer
from tests.rollout.test_unique import DRAWS, FEW, copies, small


def test_mean_gradient_is_the_exact_one(
    tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder, tiny_samples: list[Sample]
) -> None:
    """Over 3,000 groups of 2 of 5 items, the estimator's mean against ∇ Σ p · r by autograd; plain averages fail."""
    decoder, sample, size = small(tiny_decoder), tiny_samples[5], 2
    rewards = np.array([1.0, -0.5, 2.0, 0.0, 0.7])
    weight = tiny_model.model.norm.weight
    trie = TorchTrie(decoder.trie)
    paths = torch.tensor([decoder.path_of(sid) for sid in FEW])
    ids = torch.cat([torch.tensor([sample.prompt_ids]).expand(len(FEW), -1), paths], dim=1)
    was = weight.requires_grad
    weight.requires_grad_(True)
    try:
        logits = tiny_model(input_ids=ids).logits[:, -4:-1] / 2.5
        places = torch.from_numpy(decoder.trie.walk(paths.numpy())[:, :-1])
        logps, _ = trie.token_logps(logits.flatten(0, 1), places.flatten(), paths.flatten())
        item_logps = logps.view(len(FEW), 3).sum(dim=1)
        each = np.stack([torch.autograd.grad(one, weight, retain_graph=True)[0].double().numpy() for one in item_logps])
    finally:
        weight.requires_grad_(was)
    p = np.exp(item_logps.detach().double().numpy())
    assert p.sum() == pytest.approx(1, abs=1e-4)
    exact = (p * rewards) @ each
    engine = HFEngine(tiny_model, decoder, max_batch_prompts=512)
    groups = engine.generate(copies(sample, DRAWS), Sampling(size, "unique", temperature=2.5, seed=3))
    items = np.array([[FEW.index(rollout.sids[0]) for rollout in group.rollouts] for group in groups])
    logps_PG = np.array([[rollout.logp for rollout in group.rollouts] for group in groups])
    inclusion_PG = np.array([[rollout.logp_inclusion for rollout in group.rollouts] for group in groups])
    advantages = inclusion_advantages(rewards[items], logps_PG, inclusion_PG)
    estimates = np.einsum("pg,pgd->pd", advantages, each[items]) / size
    noise = estimates.std(axis=0) / DRAWS**0.5
    assert (np.abs(estimates.mean(axis=0) - exact) < 4.5 * noise + 1e-6).all()
    assert np.linalg.norm(estimates.mean(axis=0) - exact) < 0.15 * np.linalg.norm(exact)
    plain = np.einsum("pg,pgd->pd", rewards[items] - rewards[items].mean(axis=1, keepdims=True), each[items]).mean(
        axis=0
    )
    assert np.linalg.norm(plain / size - exact) > 0.3 * np.linalg.norm(exact)


def test_by_hand() -> None:
    """Both items of a catalogue of two: q = 1, and the estimate is p · (r - Σ p r) without any noise."""
    p, rewards = np.array([[0.25, 0.75]]), np.array([[1.0, 0.0]])
    found = inclusion_advantages(rewards, np.log(p), np.zeros((1, 2)))
    np.testing.assert_allclose(found, 2 * p * (rewards - 0.25))


def test_training_with_them(make_run: MakeTrainer) -> None:
    settings: dict[str, Any] = {
        "rollout.sampler": "unique",
        "rl.inclusion_weights": True,
        "rewards": [{"reward": "prefix"}],
    }
    run = make_run(settings)
    batch = run.batch()
    groups = run.fleet.seen[0]
    expected = inclusion_advantages(
        np.array([run.trainer.task.rewards.score([group])[0].total for group in groups]),
        np.array([[r.logp for r in group.rollouts] for group in groups]),
        np.array([[r.logp_inclusion for r in group.rollouts] for group in groups]),
    )
    np.testing.assert_allclose(batch["advantages"].numpy(), expected.reshape(-1), rtol=1e-5)
    with pytest.raises((ConfigError, SystemExit)):
        make_run({"rl.inclusion_weights": True})
