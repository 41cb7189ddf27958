"""The trainer against brute force: ratios, losses, gradients, order, weights, resuming, learning.

Everything is real but the fleet: `LocalFleet` (conftest) holds one real HFEngine in this process, without Ray.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainerCallback

from rl.progress import Progress
from rl.recorder import newest_checkpoint
from rl.trl_trainer import SidTrainer
from rollout.data.native import write_world
from rollout.data.world import World
from rollout.hf_engine import HFEngine, load_policy
from rollout.types import Record
from rollout.weights import checksum, merged_weights
from tests.rl.conftest import MakePolicy, MakeTrainer, Run

pytestmark = pytest.mark.slow  # about a second each, and there are many

Tensors = dict[str, torch.Tensor]

SGD = {
    "trl.optim": "sgd",
    "rl.learning_rate": 0.5,
    "rl.max_grad_norm": 0,
    "rewards": [{"reward": "prefix"}, {"reward": "ndcg@10"}],
}
"""Groups have signal, and a step is the gradient itself: Adam's first ones are its sign, which rounding can turn."""


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Tensors] = []

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def watch_gradients(trainer: SidTrainer) -> list[Tensors]:
    gradients = Gradients()
    trainer.add_callback(gradients)
    return gradients.steps


def gap(one: Tensors, two: Tensors) -> float:
    """Relative difference of two sets of tensors in norm."""
    assert one.keys() == two.keys()
    flat_one, flat_two = (torch.cat([part[name].reshape(-1) for name in sorted(part)]) for part in (one, two))
    return float((flat_one - flat_two).norm() / flat_two.norm())


def trained(run: Run) -> Tensors:
    return {name: p.detach().clone() for name, p in run.trainer.policy.named_parameters() if p.requires_grad}


def shake(model: torch.nn.Module, size: float = 0.05) -> None:
    """Move every trained weight, so that policy, sampler and reference are three different models."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)


# Brute force: one row at a time, children of a prefix by looking through all paths ----------------------------------


def legal_tokens(run: Run, prefix: tuple[int, ...]) -> list[int]:
    """Tokens after which some item of the catalogue is still possible."""
    catalog, tokenizer = run.trainer.task.decoder.catalog, run.trainer.task.tokenizer
    written = [[f"<{letter}_{code}>" for letter, code in zip("abc", sid, strict=True)] for sid in catalog.codes_NL]
    paths = {tuple(tokenizer.convert_tokens_to_ids(tokens)) for tokens in written}
    return sorted({path[len(prefix)] for path in paths if path[: len(prefix)] == prefix})


def plain_logits(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """Logits [T, V] that predict each token of a completion."""
    return model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]


def trie_logps(run: Run, model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """Log-probability of each token among the legal ones."""
    logits = plain_logits(model, prompt, completion) / run.config.rollout.temperature
    logps = []
    for step, token in enumerate(completion):
        legal = legal_tokens(run, completion[:step])
        logps.append(logits[step, legal].log_softmax(dim=0)[legal.index(token)])
    return torch.stack(logps)


def plain_grpo_loss(
    run: Run, model: torch.nn.Module, reference: torch.nn.Module | None, logps_sampler: list[list[float]]
) -> torch.Tensor:
    """GRPO with token ratios, two-sided clipping and k3, written down row by row (DeepSeekMath, eq. 3 and 4).

    TRL's `use_bias_correction_kl` multiplies k3 by the ratio (DeepSeek-V3.2), which changes its gradient on-policy too.
    """
    rl, corrected = run.config.rl, run.trainer.args.use_bias_correction_kl
    (groups,) = run.fleet.seen
    scored = run.trainer.task.rewards.score(groups)
    losses, row = [], 0
    for group, score in zip(groups, scored, strict=True):
        total = np.array(score.total)
        advantages = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            logps = trie_logps(run, model, group.sample.prompt_ids, rollout.token_ids)
            ratio = (logps - torch.tensor(logps_sampler[row])).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - rl.clip_low, 1 + rl.clip_high) * advantage)
            loss = -gain
            if reference is not None:
                with torch.no_grad():
                    behind = trie_logps(run, reference, group.sample.prompt_ids, rollout.token_ids)
                k3 = (behind - logps).exp() - (behind - logps) - 1
                loss = loss + rl.kl_coef * k3 * (ratio if corrected else 1)
            losses.append(loss.mean())
            row += 1
    return torch.stack(losses).mean()


# Distributions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sampler", ["sample", "beam"])
def test_on_policy_ratio_is_one(make_run: MakeTrainer, temperature: float, sampler: str) -> None:
    """Policy and sampler are one distribution, after updates as well."""
    run = make_run({"rl.steps": 3, "rollout.temperature": temperature, "rollout.sampler": sampler})
    lines = run.train()
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 <= line["ratio_error"] <= 1e-5 for line in lines)
    assert all(line["legal_rate"] == 1.0 for line in lines)


def test_logps_are_those_of_the_trie(make_run: MakeTrainer) -> None:
    run = make_run({"rollout.temperature": 0.8})
    batch = run.batch()
    rollouts = [(g.sample.prompt_ids, r) for g in run.fleet.seen[0] for r in g.rollouts]
    for row, (prompt, rollout) in enumerate(rollouts):
        expected = trie_logps(run, run.trainer.policy, prompt, rollout.token_ids)
        torch.testing.assert_close(batch["old_per_token_logps"][row], expected.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("packing", [True, False])
def test_full_support_differs_by_the_legal_mass(make_run: MakeTrainer, packing: bool) -> None:
    """log policy - log sampler = sum of log Z_t, Z_t the probability of all legal tokens at position t."""
    run = make_run({"rl.support": "full", "rollout.temperature": 0.9, "rl.packing": packing})
    batch = run.batch()
    with torch.no_grad():
        logps = run.trainer.scorer.scores(run.trainer.model, batch).logps_BT
        found = (logps - batch["old_per_token_logps"]).sum(dim=1)
        expected = []
        for group in run.fleet.seen[0]:
            for rollout in group.rollouts:
                shares = plain_logits(run.trainer.policy, group.sample.prompt_ids, rollout.token_ids) / 0.9
                shares = shares.softmax(dim=-1)
                masses = [shares[t, legal_tokens(run, rollout.token_ids[:t])].sum() for t in range(3)]
                expected.append(torch.stack(masses).log().sum())
    assert found.max() < -1  # the random policy leaves most of its mass outside the catalogue
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-5)


def test_full_support_shows_in_the_ratio_error(make_run: MakeTrainer) -> None:
    lines = make_run({"rl.support": "full", "rl.steps": 1}).train()
    assert lines[0]["ratio_error"] > 0.1


# Loss and gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl_coef", "corrected"), [(0.0, True), (0.3, True), (0.3, False)], ids=["no kl", "kl", "plain k3"]
)
@pytest.mark.parametrize("stale", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_loss_and_gradient_are_plain_grpo(
    make_run: MakeTrainer, kl_coef: float, corrected: bool, stale: bool, lora: bool
) -> None:
    """Off-policy the rollouts come from the base, whose ratios to the shaken policy leave the clipping range."""
    run = make_run(
        {"rl.kl_coef": kl_coef, "trl.use_bias_correction_kl": corrected, "lora.enabled": lora, "rl.steps": 1, **SGD}
    )
    base = load_policy(run.trainer.task.model_path)
    shake(run.trainer.policy)
    if not stale:
        run.fleet.version = -1  # so that the trainer brings the shaken weights before it generates
    gradients = watch_gradients(run.trainer)
    before = trained(run)
    (line,) = run.train()
    assert [call[0] for call in run.fleet.calls] == (["generate"] if stale else ["sync", "generate"])

    with torch.no_grad():  # back to where the step started; the weights moved since
        for name, parameter in run.trainer.policy.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(before[name])
    sampled = [list(rollout.logps_sampler) for group in run.fleet.seen[0] for rollout in group.rollouts]
    run.trainer.policy.zero_grad()
    loss = plain_grpo_loss(run, run.trainer.policy, base if kl_coef else None, sampled)
    loss.backward()
    expected = {n: p.grad for n, p in run.trainer.policy.named_parameters() if p.grad is not None}

    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    assert line["zero_signal_groups"] < 1
    (found,) = gradients
    assert gap(found, expected) <= 1e-4
    norm = torch.cat([part.reshape(-1) for part in expected.values()]).norm()
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    if stale:
        assert line["ratio_error"] > 0.2
        assert line["clip_ratio/region_mean"] > 0
    else:
        assert line["ratio_error"] <= 1e-5
    if kl_coef:
        assert line["kl"] > 1e-3


def test_sgd_step_is_the_gradient(make_run: MakeTrainer) -> None:
    """What the step changes is -lr times the gradient, nothing else."""
    run = make_run({"rl.steps": 1, **SGD})
    shake(run.trainer.policy)
    gradients, before = watch_gradients(run.trainer), trained(run)
    run.train()
    moved = {name: tensor - before[name] for name, tensor in trained(run).items()}
    assert gap(moved, {name: -0.5 * gradient for name, gradient in gradients[0].items()}) <= 1e-3


def two_steps(run: Run) -> tuple[list[dict[str, Any]], list[Tensors]]:
    shake(run.trainer.policy, 0.02)
    run.fleet.version = -1
    gradients = watch_gradients(run.trainer)
    return run.train(), gradients


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rl.packing": True}, {"rl.packing": False}),
        ({"rl.micro_batch_groups": 4}, {"rl.micro_batch_groups": 1}),
        ({"rl.micro_batch_groups": 4}, {"rl.micro_batch_groups": 2}),
        ({}, {"trl.gradient_checkpointing": True}),
        ({}, {"model.attention": "eager"}),
    ],
    ids=["packing", "micro-batches of 1", "micro-batches of 2", "gradient checkpointing", "attention"],
)
def test_ways_to_compute_the_same(
    make_run: MakeTrainer, one: dict[str, Any], other: dict[str, Any], lora: bool
) -> None:
    common = {"rl.kl_coef": 0.1, "lora.enabled": lora, "rl.learning_rate": 0.05}
    (lines, gradients), (others, other_gradients) = (two_steps(make_run({**SGD, **common, **s})) for s in (one, other))
    assert len(gradients) == len(other_gradients) == 2
    for line, twin in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(twin["loss"], rel=1e-5, abs=1e-6)
        assert line["grad_norm"] == pytest.approx(twin["grad_norm"], rel=1e-4)
        assert line["reward"] == twin["reward"]
    assert gap(gradients[0], other_gradients[0]) <= 1e-5
    assert gap(gradients[1], other_gradients[1]) <= 1e-4  # the weights themselves differ by a rounding now


@pytest.mark.parametrize("micro", [4, 1])
def test_two_epochs_use_rollouts_twice(make_run: MakeTrainer, micro: int) -> None:
    run = make_run(
        {"rl.steps": 4, "rl.epochs_per_batch": 2, "rl.micro_batch_groups": micro, **SGD, "rl.learning_rate": 0.05}
    )
    shake(run.trainer.policy)
    run.fleet.version = -1
    lines = run.train()
    assert [call[:2] for call in run.fleet.calls] == [("sync", 0), ("generate", 0), ("sync", 2), ("generate", 2)]
    # On-policy the loss is minus the mean advantage, which is zero; after an update of the policy it no longer is.
    for line in lines[0::2]:
        assert line["ratio_error"] <= 1e-5
        assert abs(line["loss"]) <= 1e-6
    for line in lines[1::2]:
        assert "ratio_error" not in line
        assert "reward" not in line
        assert abs(line["loss"]) > 1e-5
    steps = pq.read_table(run.folder / "rollouts")["step"].to_pylist()
    assert sorted(set(steps)) == [1, 3]


# Rows, groups and targets ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def twins(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with one and the same prompt, each with its own target."""
    rows = tuple(Record(f"train:{item}", f"user-{item}", (1, 2), (item,), (1.0,)) for item in range(len(world.catalog)))
    folder = tmp_path_factory.mktemp("twins") / "shop"
    write_world(replace(world, splits={**world.splits, "train": rows}), folder)
    return folder


def test_targets_travel_with_their_row(make_run: MakeTrainer, twins: Path) -> None:
    run = make_run(
        {"data.path": str(twins), "rl.prompts_per_step": 24, "rl.micro_batch_groups": 12, "rollout.group_size": 6,
         "rewards": [{"reward": "hit"}], "rl.steps": 1, "rl.scale_rewards": "none"}
    )  # fmt: skip
    run.train()
    (groups,) = run.fleet.seen
    assert len({group.sample.prompt_ids for group in groups}) == 1
    assert sorted(group.sample.targets for group in groups) == [(item,) for item in range(24)]
    rows = pq.read_table(run.folder / "rollouts" / "step_000001.parquet").to_pylist()
    assert len(rows) == 24 * 6
    sizes = run.trainer.task.decoder.catalog.cluster_sizes_S
    index = run.trainer.task.decoder.catalog.sid_index_of
    hits = 0
    for row in rows:
        (target,) = row["targets"]
        codes = tuple(int(part.split("_")[1]) for part in row["completion"].strip("<>").split("><"))
        expected = 1 / sizes[index[codes]] if target in row["items"] else 0.0  # a shared sid counts in expectation
        assert row["reward"] == pytest.approx(expected)
        hits += expected > 0
    assert hits >= 2


def test_groups_stay_whole_and_in_order(make_run: MakeTrainer) -> None:
    """Row p·G + g of every tensor is rollout g of group p, and micro-batches hold whole groups in that order."""
    run = make_run({"rl.kl_coef": 0.1, "rl.micro_batch_groups": 2})
    rows = [{"row": row} for row in (7, 3, 3, 11) for _ in range(4)]
    batches = []
    for step in range(2):
        run.trainer._step = step
        batches.append(run.trainer._prepare_inputs(rows))
    (groups,) = run.fleet.seen
    assert [group.sample for group in groups] == [run.trainer.samples[row] for row in (7, 3, 3, 11)]
    scored = run.trainer.task.rewards.score(groups)
    advantages = run.trainer.algorithm.advantages(np.array([score.total for score in scored])).reshape(-1)
    flat = [(group.sample.prompt_ids, rollout) for group in groups for rollout in group.rollouts]
    for row, (prompt, rollout) in enumerate(flat):
        batch, place = batches[row // 8], row % 8
        assert batch["prompt_ids"][place][batch["prompt_mask"][place].bool()].tolist() == list(prompt)
        assert batch["completion_ids"][place].tolist() == list(rollout.token_ids)
        assert batch["old_per_token_logps"][place].tolist() == pytest.approx(list(rollout.logps_sampler))
        assert float(batch["advantages"][place]) == pytest.approx(advantages[row], rel=1e-6)
        with torch.no_grad():
            expected = trie_logps(run, load_policy(run.trainer.task.model_path), prompt, rollout.token_ids)
        torch.testing.assert_close(batch["ref_per_token_logps"][place], expected, atol=1e-5, rtol=0)


def test_rows_that_are_no_whole_groups_stop_the_run(make_run: MakeTrainer) -> None:
    trainer = make_run().trainer
    with pytest.raises(RuntimeError, match="whole groups"):
        trainer.samples_of([{"row": row} for row in (1, 1, 1, 2, 1, 2, 2, 2)])


def test_every_row_is_used_once_an_epoch(make_run: MakeTrainer) -> None:
    run = make_run({"rl.steps": 12, "output.rollouts_every": 0})
    run.train()
    seen = [group.sample.record.source for groups in run.fleet.seen for group in groups]
    assert sorted(seen) == sorted(sample.record.source for sample in run.trainer.samples)
    assert seen != [sample.record.source for sample in run.trainer.samples]


def test_reward_metrics(make_run: MakeTrainer) -> None:
    """Means of what the rewards gave; groups of equal rewards are counted."""
    run = make_run({"rl.steps": 1, "rewards": [{"reward": "ndcg@10"}, {"reward": "prefix", "weight": 0.5}]})
    (line,) = run.train()
    scored = run.trainer.task.rewards.score(run.fleet.seen[0])
    ndcg = np.array([score.rewards["ndcg@10"] for score in scored])
    prefix = np.array([score.rewards["prefix"] for score in scored])
    total = ndcg + 0.5 * prefix
    assert line["reward/ndcg@10"] == pytest.approx(ndcg.mean())
    assert line["reward/prefix"] == pytest.approx(prefix.mean())
    assert line["reward"] == pytest.approx(total.mean())
    assert line["reward_std"] == pytest.approx(total.std(axis=1).mean())
    assert line["zero_signal_groups"] == pytest.approx(np.mean([len(set(group)) == 1 for group in total.tolist()]))
    distinct = [len({rollout.sids for rollout in group.rollouts}) / 4 for group in run.fleet.seen[0]]
    assert line["distinct_items"] == pytest.approx(np.mean(distinct))
    assert {"seconds/rollout", "seconds/reward", "seconds/update", "policy_version"} <= line.keys()


# Weights --------------------------------------------------------------------------------------------------------------


class SameWeights(TrainerCallback):
    """After each generation, compares the engine's model with the policy that generated."""

    def __init__(self, run: Run) -> None:
        self.run, self.gaps = run, []  # type: ignore[var-annotated]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        trainer = self.run.trainer
        trainer.sync_weights()
        ids = torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(1))
        was_training = trainer.policy.training
        trainer.policy.eval()
        with torch.no_grad():
            logits = [model(input_ids=ids).logits for model in (trainer.policy, self.run.fleet.engine.model)]
        trainer.policy.train(was_training)
        self.gaps.append(float((logits[0] - logits[1]).norm() / logits[0].norm()))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_engine_follows_the_policy(make_run: MakeTrainer, make_policy: MakePolicy, lora: bool, tied: bool) -> None:
    run = make_run(
        {"rl.steps": 3, "lora.enabled": lora, "model.path": str(make_policy(tied=tied)), "rl.learning_rate": 0.01}
    )
    start = checksum(merged_weights(run.trainer.policy))
    same = SameWeights(run)
    run.trainer.add_callback(same)
    lines = run.train()
    run.trainer.sync_weights()
    assert len(same.gaps) == 3
    assert max(same.gaps) <= 1e-5
    assert [call[1] for call in run.fleet.calls if call[0] == "sync"] == [1, 2, 3]
    assert [line["policy_version"] for line in lines] == [0, 1, 2]
    checksums = [start, *run.fleet.checksums.values()]
    assert len(set(checksums)) == 4
    assert checksums[-1] == checksum(merged_weights(run.trainer.policy))
    own = {name: tensor for name, tensor in run.fleet.engine.model.state_dict().items()}
    assert checksum({name: own[name] for name in merged_weights(run.trainer.policy)}) == checksums[-1]


def test_weights_are_sent_once_a_version(make_run: MakeTrainer) -> None:
    run = make_run({"rl.steps": 2})
    run.train()
    run.trainer.sync_weights()
    run.trainer.sync_weights()
    assert [call[1] for call in run.fleet.calls if call[0] == "sync"] == [1, 2]


class ForgetfulEngine(HFEngine):
    """Reports another version than it was given."""

    def load_weights(self, weights: Any, version: int) -> str:
        return super().load_weights(weights, version - 1)


class DeafEngine(HFEngine):
    """Says it took the weights and keeps its own."""

    def load_weights(self, weights: Any, version: int) -> str:
        self.policy_version = version
        own = self.model.state_dict()
        return checksum({name: own[name] for name in weights})


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "says"),
    [(ForgetfulEngine, r"engine 0 reports \(0, '\w+'\) after loading version 1"), (DeafEngine, "with checksum")],
)
def test_wrong_weights_stop_the_run(make_run: MakeTrainer, own_ray: None, engine: type[HFEngine], says: str) -> None:
    """The real fleet, with an engine that lies, in a Ray actor."""
    import ray

    from rollout.engine import EngineSpec, engine_spec
    from rollout.ray_fleet import Fleet, FleetError

    run = make_run({"rl.steps": 3, "rl.learning_rate": 0.01, "rollout.cpus_per_engine": 0.1})

    class Spec(EngineSpec):
        def build(self, decoder: Any) -> Any:
            return engine(load_policy(self.model_path), decoder)

    import sys

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    fleet = Fleet(Spec(**vars(engine_spec(run.config, run.trainer.task.model_path))), run.trainer.task.decoder)
    try:
        run.trainer.fleet = fleet
        with pytest.raises(FleetError, match=says):
            run.trainer.train()
        assert run.trainer.state.global_step == 1
    finally:
        fleet.close()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
@pytest.mark.slow
def test_stale_rollouts_stop_the_run(make_run: MakeTrainer, own_ray: None) -> None:
    """An engine whose weights were changed behind the fleet's back."""
    import ray

    from rollout.engine import engine_spec
    from rollout.ray_fleet import Fleet, FleetError

    run = make_run({"rl.steps": 1, "rollout.cpus_per_engine": 0.1})
    fleet = Fleet(engine_spec(run.config, run.trainer.task.model_path), run.trainer.task.decoder)
    try:
        run.trainer.fleet = run.trainer.ahead.fleet = fleet
        ray.get(fleet.engines[0].load.remote(merged_weights(run.trainer.policy), 7))
        with pytest.raises(FleetError, match=r"policy version \[7\] where version 0 was asked for"):
            run.trainer.train()
    finally:
        fleet.close()


def test_all_weights(make_run: MakeTrainer) -> None:
    """Full fine-tuning moves every matrix, leaves the folder as it was, and trains on the ratio 1."""
    run = make_run({"lora.enabled": False, "rl.steps": 2, "rl.learning_rate": 1e-3})
    before = trained(run)
    lines = run.train()
    assert not hasattr(run.trainer.policy, "peft_config")
    assert all(line["ratio_error"] <= 1e-5 for line in lines)
    after = trained(run)
    assert after.keys() == {name for name, _ in load_policy(run.trainer.task.model_path).named_parameters()}
    assert all(not torch.equal(after[name], before[name]) for name in after)


def test_adapter_on_the_output_layer(make_run: MakeTrainer, make_policy: MakePolicy) -> None:
    """Trained, scored and sent to the engine like any other; a tied output matrix cannot have one of its own."""
    wide = {"lora.target_modules": ["q_proj", "lm_head"], "rl.steps": 3, "rl.learning_rate": 0.02}
    run = make_run({**wide, "model.path": str(make_policy(tied=False))})
    lines = run.train()
    assert any("lm_head.lora_B" in name and tensor.abs().max() > 0 for name, tensor in trained(run).items())
    assert all(line["ratio_error"] <= 1e-5 for line in lines)
    with pytest.raises(ValueError, match="output matrix is tied to its embedding"):
        make_run(wide).train()


def test_lora_trains_the_adapter_alone(make_run: MakeTrainer) -> None:
    run = make_run({"rl.steps": 2, "rl.learning_rate": 0.01})
    frozen = {n: p.clone() for n, p in run.trainer.policy.named_parameters() if not p.requires_grad}
    run.train()
    assert all("lora_" in name for name in trained(run))
    now = dict(run.trainer.policy.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
    assert any("lora_B" in name and tensor.any() for name, tensor in trained(run).items())


# Resuming -------------------------------------------------------------------------------------------------------------


def killed_copy(run: Run, folder: Path, step: int) -> Path:
    """A run folder as it stands when the process dies while it writes the checkpoint after the next step."""
    shutil.copytree(run.folder / "checkpoints" / f"checkpoint-{step}", folder / "checkpoints" / f"checkpoint-{step}")
    half = folder / "checkpoints" / f"checkpoint-{step + 1}"
    shutil.copytree(folder / "checkpoints" / f"checkpoint-{step}", half)
    (half / "complete.json").unlink()
    (half / "optimizer.pt").write_bytes(b"cut off")
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 1]) + lines[step + 1][:20])
    return folder


def same_but_seconds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("seconds", "time", "runtime", "per_second")
    return [{key: value for key, value in line.items() if not any(word in key for word in timed)} for line in lines]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"rl.steps": 4, "output.checkpoint_every": 2}, id="lora"),
        pytest.param(
            {"rl.steps": 4, "output.checkpoint_every": 2, "lora.enabled": False, "rl.learning_rate": 1e-3}, id="full"
        ),
        pytest.param(
            {"rl.steps": 6, "output.checkpoint_every": 4, "rl.prompts_per_step": 16, "rl.lr_schedule": "linear"},
            id="second pass over the rows",
        ),
        pytest.param(
            {"rl.steps": 4, "output.checkpoint_every": 2, "rl.epochs_per_batch": 2},
            id="two epochs a batch",
        ),
        pytest.param({"rl.steps": 4, "output.checkpoint_every": 2, "lora.dropout": 0.2}, id="dropout"),
    ],
)
def test_resumed_is_uninterrupted(make_run: MakeTrainer, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"rl.kl_coef": 0.05, "rl.lr_warmup_steps": 2, **settings}
    straight = make_run(settings)
    lines = straight.train()
    step = settings["output.checkpoint_every"]
    folder = killed_copy(straight, tmp_path / "killed", step)

    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{step}"
    torch.manual_seed(99)  # another process stands elsewhere
    resumed = make_run(settings, folder=folder, start_at=step)
    assert [line["step"] for line in resumed.metrics()] == list(range(1, step + 1))
    again = resumed.train(checkpoint)
    assert same_but_seconds(again) == same_but_seconds(lines)
    one, two = trained(straight), trained(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert resumed.fleet.calls[0] == ("sync", step)


def test_checkpoints_are_marked_whole_and_the_oldest_go(make_run: MakeTrainer) -> None:
    run = make_run({"rl.steps": 4, "output.checkpoint_every": 1, "output.keep_checkpoints": 2})
    run.train()
    folders = sorted(path.name for path in (run.folder / "checkpoints").glob("checkpoint-*"))
    assert folders == ["checkpoint-3", "checkpoint-4"]
    for name in folders:
        sizes = json.loads((run.folder / "checkpoints" / name / "complete.json").read_text())
        assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= sizes.keys()


def test_one_checkpoint_at_the_end_unless_asked(make_run: MakeTrainer) -> None:
    run = make_run({"rl.steps": 3})
    run.train()
    assert [path.name for path in (run.folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]


# Settings -------------------------------------------------------------------------------------------------------------


def test_settings_reach_trl_and_peft(make_run: MakeTrainer) -> None:
    run = make_run(
        {
            "trl.weight_decay": 0.03,
            "trl.optim": "adafactor",
            "trl.adam_beta2": 0.95,
            "trl.loss_type": "dr_grpo",
            "trl.importance_sampling_level": "sequence",
            "lora.extra.use_rslora": True,
            "lora.alpha": 6,
            "lora.dropout": 0.1,
            "lora.target_modules": ["q_proj", "v_proj"],
            "rl.clip_low": 0.1,
            "rl.clip_high": 0.28,
            "rl.kl_coef": 0.02,
            "rl.lr_schedule": "cosine",
            "rl.lr_warmup_steps": 1,
            "rl.epochs_per_batch": 2,
            "seed": 5,
        }
    )
    trl = run.trainer.args
    assert (trl.weight_decay, trl.optim, trl.adam_beta2) == (0.03, "adafactor", 0.95)
    assert (trl.loss_type, trl.importance_sampling_level) == ("dr_grpo", "sequence")
    assert (trl.epsilon, trl.epsilon_high, run.trainer.beta, trl.num_iterations) == (0.1, 0.28, 0.02, 2)
    assert (trl.lr_scheduler_type, trl.warmup_steps, trl.seed) == ("cosine", 1, 5)
    assert (trl.per_device_train_batch_size, trl.gradient_accumulation_steps, trl.max_steps) == (8, 2, 2)
    peft = run.trainer.policy.peft_config["default"]
    assert (peft.use_rslora, peft.r, peft.lora_alpha, peft.lora_dropout) == (True, 4, 6, 0.1)
    assert peft.target_modules == {"q_proj", "v_proj"}
    layer = next(m for n, m in run.trainer.policy.named_modules() if n.endswith("q_proj"))
    assert layer.scaling["default"] == pytest.approx(6 / 4**0.5)  # rank-stabilised: alpha / sqrt(r)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo"])
def test_losses_of_trl_train(make_run: MakeTrainer, loss: str) -> None:
    lines = make_run({"trl.loss_type": loss, "rl.steps": 2}).train()
    assert all(line["ratio_error"] <= 1e-5 and np.isfinite(line["loss"]) for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)


def test_evaluation_on_valid(make_run: MakeTrainer) -> None:
    """`eval.every`: metrics of the valid rows in that step's line, and the training goes on as without it."""
    from rl.evaluate import evaluate

    with_valid, without = make_run({"rl.steps": 3, "eval.every": 3}), make_run({"rl.steps": 3})
    lines, plain = with_valid.train(), without.train()
    valid = {key.removeprefix("valid/"): value for key, value in lines[2].items() if key.startswith("valid/")}
    assert not any(key.startswith("valid/") for line in lines[:2] for key in line)
    found = evaluate(
        with_valid.trainer.policy, with_valid.trainer.task, with_valid.config, "valid", Progress(), "evaluate"
    ).flat()
    assert valid["ndcg@10"] == pytest.approx(found["ndcg@10"])
    assert valid["rows"] == 10
    for line, twin in zip(same_but_seconds(lines), same_but_seconds(plain), strict=True):
        assert {key: line[key] for key in twin} == twin


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_it_learns(make_run: MakeTrainer, world: World, tmp_path: Path, lora: bool) -> None:
    """Four users who all want item 5: after fifteen steps nearly every rollout is it."""
    rows = tuple(Record(f"train:{user}", f"u{user}", (user, user + 1), (5,), (1.0,)) for user in range(4))
    write_world(replace(world, splits={**world.splits, "train": rows}), tmp_path / "shop")
    run = make_run(
        {
            "data.path": str(tmp_path / "shop"),
            "rewards": [{"reward": "hit"}],
            "rollout.group_size": 16,
            "rl.micro_batch_groups": 4,
            "rl.steps": 15,
            "rl.learning_rate": 0.01 if lora else 0.002,
            "lora.enabled": lora,
        }
    )
    rewards = [line["reward"] for line in run.train()]
    assert rewards[0] < 0.2
    assert np.mean(rewards[-3:]) > 0.8


def test_seeds(make_run: MakeTrainer) -> None:
    """One seed gives one run, another seed another."""
    first, again, other = (make_run({"seed": seed, "rl.steps": 2}) for seed in (4, 4, 5))
    assert same_but_seconds(first.train()) == same_but_seconds(again.train())
    assert first.fleet.seen == again.fleet.seen
    other.train()
    assert first.fleet.seen != other.fleet.seen


def test_a_finished_run_is_only_loaded(make_run: MakeTrainer) -> None:
    """Resuming what has all its steps takes no further one and has the weights it ended with."""
    run = make_run({"rl.steps": 2})
    lines = run.train()
    checkpoint = newest_checkpoint(run.folder / "checkpoints")
    again = make_run({"rl.steps": 2}, folder=run.folder, start_at=2)
    again.trainer.train_from(checkpoint)
    assert again.metrics() == lines
    assert again.trainer.state.global_step == 2
    assert all(torch.equal(tensor, trained(run)[name]) for name, tensor in trained(again).items())
    again.trainer.sync_weights()
    assert again.fleet.checksums[2] == checksum(merged_weights(run.trainer.policy))
