"""The trainer: TRL's GRPOTrainer with our stages in the two places where they meet its loop.

TRL owns the optimizer, accumulation, losses, checkpoints and logging. `_generate_and_score_completions` is the page of
verbs (generate, score, compare, pack), `_get_per_token_logps_and_entropies` scores tokens on the trie's support.

Axes: B rows of a micro-batch, T completion tokens, P prompts (groups) of a step, G rollouts of a group.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from trl import GRPOTrainer

from configs.schema import RunConfig
from rewards.protocol import ScoredGroup
from rl.advantages import group_advantages
from rl.ahead import RolloutsAhead
from rl.algorithms import Algorithm, without_signal
from rl.batch import Batch, BatchScorer, slices_of
from rl.evaluate import evaluate
from rl.injection import draw_targets, inject_targets
from rl.notes import Phases, rewards_of, rollout_notes, score_notes
from rl.recorder import Recorder
from rl.scoring import TokenScores, require_exact
from rl.task import Task
from rl.thoughts import penalised
from rl.trailing import Reference, TrailingWeights
from rl.trl_arguments import adapter_config, adapter_on_output_layer_allowed, grpo_arguments, with_adapter
from rl.trl_sampler import EpochSampler
from rollout.ray_fleet import Adapter, Fleet
from rollout.support import TorchTrie
from rollout.types import RolloutGroup, Sample, Sampling
from rollout.weights import checksum, merged_weights

AVERAGE = "average.safetensors"


class AfterStep(TrainerCallback):
    """Calls the trainer after each optimizer step, before the step's metrics are written."""

    def __init__(self, trainer: SidTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Called by TRL's loop."""
        self.trainer.after_step(state.global_step)


class SidTrainer(GRPOTrainer):
    """Policy updates on groups of rollouts that a fleet drew under the trie.

    Args:
        model: the policy.
        task: data, trie, rewards.
        fleet: the rollout engines; their weights follow the policy's.
        algorithm: advantages and loss.
        config: the run's settings.
        recorder: keeps metrics and rollouts.
        folder: where checkpoints go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        fleet: Fleet,
        algorithm: Algorithm,
        config: RunConfig,
        recorder: Recorder,
        folder: Path,
    ) -> None:
        self.task, self.fleet, self.algorithm, self.config, self.recorder = task, fleet, algorithm, config, recorder
        self.samples = task.samples["train"]
        self.phase = Phases()
        self._ratio_errors: list[float] = []
        self._on_policy = True  # the weights are those that this batch was drawn from
        self._slices: list[Batch] = []  # this batch of rollouts, a slice per micro-batch
        require_exact(model, packing=config.rl.packing)
        policy = with_adapter(model, config)
        with adapter_on_output_layer_allowed(policy):
            super().__init__(
                model=policy,
                reward_funcs=[_scored_in_groups],
                args=grpo_arguments(
                    config, algorithm, folder, completion=task.completion_tokens, bf16=model.dtype == torch.bfloat16
                ),
                train_dataset=Dataset.from_dict({"row": list(range(len(self.samples)))}),
                processing_class=task.tokenizer,
            )
        trie = TorchTrie(task.decoder.trie, self.accelerator.device, task.thought.banned if task.thought else ())
        self.scorer = BatchScorer(task, config, trie, self.accelerator.autocast)
        self.add_callback(AfterStep(self))
        rl = config.rl
        self.beta = rl.kl_coef  # TRL was told of none, for it would have made a reference of its own
        self.reference = (
            Reference(self.policy, every=rl.sync_ref_every, mixup=rl.sync_ref_mixup) if rl.kl_coef else None
        )
        self.average = TrailingWeights(self.policy, 1 - rl.average_decay) if rl.average_decay else None
        order = self._get_train_sampler()
        self.ahead = RolloutsAhead(
            fleet,
            staleness=config.rollout.max_staleness,
            every=rl.epochs_per_batch,
            last=rl.steps,
            samples_of=lambda step: [self.samples[row] for row in order.batch(step // rl.epochs_per_batch)],
            sampling_of=self.sampling_of,
        )
        if self.accelerator.num_processes > 1:
            raise ValueError("one trainer process only: ranks would each need their share of the fleet's groups")

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint on if there is one; with `rl.average_decay` the policy then is the average.

        A run that has all its steps is only loaded: transformers takes one more step from its last checkpoint.
        """
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
        if checkpoint and state and state.global_step >= self.args.max_steps:
            self._load_from_checkpoint(str(checkpoint))
            self.state = state
        else:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.average is not None:
            self.average.swap()

    # The loop's stages ------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        samples = self.samples_of(inputs)
        self.sync_weights()
        scored = [group for drawn in self.generate(samples) for group in self.score(self.inject(drawn))]
        scored = self.refill(scored)
        self.note(**score_notes(scored))
        batch = self.pack([group.group for group in scored])
        batch["advantages"] = self.advantages(scored, batch)
        each_PG = batch["advantages"].view(len(samples), self.num_generations, -1).mean(dim=2)  # over its tokens
        self.recorder.rollouts(self.state.global_step + 1, scored, each_PG.cpu().numpy())
        return batch

    def samples_of(self, rows: list[dict[str, Any]]) -> list[Sample]:
        """TRL repeats each row G times in a run; one sample is taken for each run."""
        indices = [row["row"] for row in rows]
        firsts = indices[:: self.num_generations]
        if indices != [index for index in firsts for _ in range(self.num_generations)]:
            raise RuntimeError("TRL's sampler no longer gives whole groups in a row; this trainer needs them so")
        return [self.samples[index] for index in firsts]

    def sync_weights(self) -> None:
        """Bring the policy's weights to every engine, unless they have them."""
        version = self.state.global_step
        if self.fleet.version == version:
            return
        with self.phase("sync"):
            if self.config.rollout.sync == "adapter":
                tensors = {k: v.detach().cpu() for k, v in get_peft_model_state_dict(self.policy).items()}
                brought: Any = Adapter(tensors, adapter_config(self.policy))
            else:
                brought = tensors = merged_weights(self.policy)
            self.fleet.sync(brought, version, checksum(tensors), wait=not self.config.rollout.max_staleness)

    def generate(self, samples: list[Sample], again: int = 0) -> Iterator[list[RolloutGroup]]:
        """G rollouts for each sample, some groups at a time; `again` counts further draws of one step."""
        step, sampling = self.state.global_step, self.sampling_of(self.state.global_step, again)
        drawn = self.fleet.collect(self.fleet.start(samples, sampling)) if again else self.ahead.take(step, samples)
        while True:
            with self.phase("rollout"):
                groups = next(drawn, None)
            if groups is None:
                return
            self.note(**rollout_notes(groups), staleness=step - groups[0].policy_version)
            self._on_policy = step == groups[0].policy_version
            yield groups

    def sampling_of(self, step: int, again: int = 0) -> Sampling:
        """How the rollouts of a step are drawn."""
        rollout = self.config.rollout
        return Sampling(
            rollout.group_size,
            rollout.sampler,
            rollout.temperature,
            top_p=rollout.top_p,
            items=rollout.items_per_completion,
            thought=self.task.thought,
            seed=self.draw_seed(step, again),
        )

    def inject(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        """Put a target into each group that found none, if `rl.inject_targets` says so."""
        if not self.config.rl.inject_targets:
            return groups
        with self.phase("inject"):
            groups, injected = inject_targets(groups, self.drawn_targets(groups), self.task.decoder, self.policy_logps)
        self.note(injected_targets=float(injected))
        return groups

    def score(self, groups: list[RolloutGroup]) -> list[ScoredGroup]:
        """Rewards of whole groups."""
        with self.phase("reward"):
            scored = self.task.rewards.score(groups)
        thought = self.config.thought
        return penalised(scored, thought.penalty) if thought.unfinished == "penalise" else scored

    def refill(self, scored: list[ScoredGroup]) -> list[ScoredGroup]:
        """Replace groups without signal by groups of fresh prompts, `rl.refill_rounds` times at most (DAPO, eq. 11)."""
        rounds = self.config.rl.refill_rounds
        if not rounds:
            return scored
        scored, drawn = list(scored), 0
        fresh = np.random.default_rng([self.config.seed, self.state.global_step]).permutation(len(self.samples))
        for again in range(1, rounds + 1):
            empty = np.flatnonzero(without_signal(rewards_of(scored)))
            rows, fresh = fresh[: len(empty)], fresh[len(empty) :]
            if not len(rows):
                break
            drawn += len(rows)
            fresh_groups = self.generate([self.samples[row] for row in rows], again)
            for place, group in zip(empty, (one for drawn in fresh_groups for one in self.score(drawn)), strict=False):
                scored[place] = group
        self.note(refilled_groups=float(drawn))
        return scored

    def pack(self, groups: list[RolloutGroup]) -> Batch:
        """Tensors of the loss, groups whole and in order."""
        batch = self.scorer.batch(groups)
        if self.algorithm.importance:  # without them TRL takes the policy's own: a ratio of 1, the plain gradient
            batch["old_per_token_logps"] = batch["sampler_logps"]
        if self.config.rl.sft_coef:
            batch |= self.scorer.targets(batch, self.drawn_targets(groups))
        if self.beta != 0.0:
            batch["ref_per_token_logps"] = self.reference_logps(batch)
        return batch

    def advantages(self, scored: list[ScoredGroup], batch: Batch) -> torch.Tensor:
        """Advantages of the rollouts, [B] or per token [B, T]."""
        length = batch["completion_ids"].shape[1]
        advantages = group_advantages(scored, self.config, self.algorithm, self.task.decoder.catalog, length)
        return torch.from_numpy(advantages).float().to(self.accelerator.device).flatten(0, 1)

    def reference_logps(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities [B, T] of the completions under the reference."""
        assert self.reference is not None
        with self.phase("reference"), self.reference.shown():
            return self.scorer.logps(self.model, batch)

    def policy_logps(self, groups: Sequence[RolloutGroup]) -> np.ndarray:
        """The policy's log-probabilities [B, T] of the rollouts of groups of equal size."""
        return self.scorer.logps(self.model, self.scorer.batch(groups), len(groups[0])).cpu().numpy()

    def drawn_targets(self, groups: Sequence[RolloutGroup]) -> list[int]:
        """One target item for each group, the same ones however often it is asked in a step."""
        return draw_targets([group.sample for group in groups], self.draw_seed(self.state.global_step, 0))

    # TRL's hooks ------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        return EpochSampler(
            data_source=dataset if dataset is not None else self.train_dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> Batch:
        """Slices of the buffered rollouts. TRL shuffles completions across groups here; ours stay whole, in order."""
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or not self._slices:
            batch = self._generate_and_score_completions(generation_batch)
            self._slices = slices_of(batch, self.args.steps_per_generation)
        return self._slices[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        with self.phase("update"):
            self._scores, target_logps_MT = self.scorer.scores_and_targets(model, inputs)
            loss = super()._compute_loss(model, inputs)  # which asks for the scores below
            further = self.further_loss(inputs, self._scores, target_logps_MT)
            if further is not None:
                loss = loss + further / self.current_gradient_accumulation_steps
            if self.first_pass and self._on_policy:
                gap = (self._scores.logps_BT.detach() - inputs["sampler_logps"]) * inputs["completion_mask"]
                self._ratio_errors.append(float(gap.exp().sub(1).abs().max()))
        return loss

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        """TRL's loss scores its rows here; `_compute_loss` has done so already, packed and under the trie."""
        return self._scores.logps_BT, self._scores.entropies_BT, None

    def further_loss(
        self, inputs: Batch, scores: TokenScores, target_logps_MT: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What is added to the algorithm's loss of a micro-batch: `rl.sft_coef` times the targets' mean NLL."""
        if target_logps_MT is None:
            return None
        nll = -target_logps_MT.sum(dim=1).mean()
        self.note(target_nll=float(nll.detach()))
        return self.config.rl.sft_coef * nll

    def after_step(self, step: int) -> None:
        """What happens between steps: reference and average follow the policy, valid may be evaluated."""
        if self.reference is not None:
            self.reference.after_step(step)
        if self.average is not None:
            self.average.follow()
        if self.config.eval.every and step % self.config.eval.every == 0:
            with self.average.shown() if self.average is not None else nullcontext():
                self.evaluate_on_valid()

    def evaluate_on_valid(self) -> None:
        """Beam search on the valid rows; its metrics stand in this step's line as `valid/...`."""
        evaluation = evaluate(self.policy, self.task, self.config, "valid", self.recorder.progress, "evaluate valid")
        self.note(**{f"valid/{name}": float(value) for name, value in evaluation.flat().items()})

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; what is not a named phase counts as update."""
        start, named = time.perf_counter(), self.phase.total
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.phase.seconds["update"] += time.perf_counter() - start - (self.phase.total - named)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add phases and the ratio error to each step's metrics and write them down."""
        stepped = "loss" in logs
        if stepped:
            self.note(**self.phase.notes())
            if self._ratio_errors:
                self.note(ratio_error=max(self._ratio_errors))
            self._ratio_errors.clear()
        super().log(logs, start_time)
        if stepped:
            self.recorder.step(self.state.global_step, self.state.max_steps, logs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.save_more(folder)
        self.recorder.checkpoint_complete(folder)

    def save_more(self, folder: Path) -> None:
        """What a checkpoint holds besides TRL's files."""
        if self.reference is not None:
            self.reference.save(folder)
        if self.average is not None:
            self.average.save(folder / AVERAGE)
        self.ahead.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_more(Path(resume_from_checkpoint))

    def load_more(self, folder: Path) -> None:
        """The counterpart of `save_more`."""
        if self.reference is not None:
            self.reference.load(folder)
        if self.average is not None:
            self.average.load(folder / AVERAGE, "rl.average_decay")
        self.ahead.load(folder)

    # Small parts ------------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        """The model without accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def first_pass(self) -> bool:
        """No update since these rollouts were drawn: policy and sampler should be one distribution."""
        every = self.args.steps_per_generation * self.num_iterations
        return self._step % every < self.args.gradient_accumulation_steps

    def draw_seed(self, step: int, again: int) -> int:
        """Seed of a step's draws; `again` counts further ones."""
        return (self.config.seed * 1_000_003 + step) * 1_009 + again

    def note(self, **values: float) -> None:
        """Metrics of this step; TRL averages what is noted more than once."""
        for name, value in values.items():
            self._metrics["train"][name].append(value)


def _scored_in_groups(**_: Any) -> list[float]:
    """TRL wants a reward function; ours see whole groups, in `SidTrainer.score`, so this one is never called."""
    raise RuntimeError("rewards are scored in SidTrainer.score")
