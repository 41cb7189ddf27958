"""The trainer: TRL's GRPOTrainer with our stages in the two places where they meet its loop.

TRL owns the optimizer, accumulation, losses, checkpoints and logging. `_generate_and_score_completions` is the page of
verbs (generate, score, compare, pack), `_get_per_token_logps_and_entropies` scores tokens on the trie's support.

Axes: B rows of a micro-batch, T completion tokens, P prompts (groups) of a step, G rollouts of a group.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from configs.schema import RunConfig
from rewards.protocol import ScoredGroup
from rl.algorithms import Algorithm, without_signal
from rl.evaluate import evaluate
from rl.packing import pack_groups
from rl.recorder import Recorder
from rl.task import Task
from rl.trl_arguments import adapter_config, grpo_arguments, peft_arguments
from rl.trl_sampler import EpochSampler
from rollout.ray_fleet import Adapter, Fleet
from rollout.support import WHOLE_VOCABULARY, TorchTrie
from rollout.types import RolloutGroup, Sample, Sampling
from rollout.weights import checksum, merged_weights


class EvaluateOnValid(TrainerCallback):
    """Evaluates every so many steps, before the step's metrics are written."""

    def __init__(self, trainer: SidTrainer, every: int) -> None:
        self.trainer, self.every = trainer, every

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Called by TRL's loop after each optimizer step."""
        if state.global_step % self.every == 0:
            self.trainer.evaluate_on_valid()


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
        self.trie = TorchTrie(task.decoder.trie, model.device)
        self._seconds: dict[str, float] = defaultdict(float)
        self._ratio_errors: list[float] = []
        self._slices: list[dict[str, torch.Tensor]] = []  # this batch of rollouts, a slice per micro-batch
        self._logps: torch.Tensor | None = None
        super().__init__(
            model=model,
            reward_funcs=[_scored_in_groups],
            args=grpo_arguments(
                config,
                algorithm,
                folder,
                completion=task.decoder.trie.depth,
                bf16=model.dtype == torch.bfloat16,
            ),
            train_dataset=Dataset.from_dict({"row": list(range(len(self.samples)))}),
            processing_class=task.tokenizer,
            peft_config=peft_arguments(config),
        )
        if config.eval.every:
            self.add_callback(EvaluateOnValid(self, config.eval.every))
        if self.accelerator.num_processes > 1:
            raise ValueError("one trainer process only: ranks would each need their share of the fleet's groups")

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint on if there is one; a run that has all its steps is only loaded.

        (transformers takes one more step from the last checkpoint of a finished run.)
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    # The loop's stages ------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        samples = self.samples_of(inputs)
        self.sync_weights()
        scored = self.score(self.generate(samples))
        scored = self.refill(scored)
        self.note_scores(scored)
        advantages_PG = self.algorithm.advantages(rewards_of(scored))
        self.recorder.rollouts(self.state.global_step + 1, scored, advantages_PG)
        return self.pack([group.group for group in scored], advantages_PG)

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
                self.fleet.sync(Adapter(tensors, adapter_config(self.policy)), version, checksum(tensors))
            else:
                weights = merged_weights(self.policy)
                self.fleet.sync(weights, version, checksum(weights))

    def generate(self, samples: list[Sample], again: int = 0) -> list[RolloutGroup]:
        """G rollouts for each sample, of the current policy version; `again` counts further draws of one step."""
        rollout = self.config.rollout
        seed = (self.config.seed * 1_000_003 + self.state.global_step) * 1_009 + again
        sampling = Sampling(rollout.group_size, rollout.sampler, rollout.temperature, seed=seed)
        with self.phase("rollout"):
            groups = self.fleet.generate(samples, sampling)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        self.note("legal_rate", float(np.mean([rollout.legal for rollout in rollouts])))
        self.note("distinct_items", float(np.mean([len({r.sids for r in g.rollouts}) / len(g) for g in groups])))
        self.note("policy_version", float(groups[0].policy_version))
        return groups

    def score(self, groups: list[RolloutGroup]) -> list[ScoredGroup]:
        """Rewards of whole groups."""
        with self.phase("reward"):
            return self.task.rewards.score(groups)

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
            for place, group in zip(
                empty, self.score(self.generate([self.samples[row] for row in rows], again)), strict=False
            ):
                scored[place] = group
        self.note("refilled_groups", float(drawn))
        return scored

    def note_scores(self, scored: list[ScoredGroup]) -> None:
        """What the rewards tell of the batch."""
        for name in scored[0].rewards:
            self.note(f"reward/{name}", float(np.mean([group.rewards[name] for group in scored])))
        for name in scored[0].parts:
            self.note(f"reward/{name}", float(np.mean([group.parts[name] for group in scored])))
        rewards_PG = rewards_of(scored)
        self.note("reward", float(rewards_PG.mean()))
        self.note("reward_std", float(rewards_PG.std(axis=1).mean()))
        self.note("zero_signal_groups", float(without_signal(rewards_PG).mean()))

    def pack(self, groups: list[RolloutGroup], advantages_PG: np.ndarray) -> dict[str, torch.Tensor]:
        """Tensors of the loss, groups whole and in order."""
        device = self.accelerator.device
        prompts = [group.sample.prompt_ids for group in groups for _ in group.rollouts]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        batch = {
            "prompt_ids": _pad(prompts, self._tokenizer.pad_token_id, left=True),
            "prompt_mask": _pad([[1] * len(prompt) for prompt in prompts], 0, left=True),
            "completion_ids": _pad([r.token_ids for r in rollouts], self._tokenizer.pad_token_id),
            "completion_mask": _pad([[1] * len(r.token_ids) for r in rollouts], 0),
            "sampler_logps": _pad([r.logps_sampler for r in rollouts], 0.0),
            "advantages": torch.from_numpy(advantages_PG.reshape(-1)).float(),
        }
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        if self.algorithm.importance:  # without them TRL takes the policy's own: a ratio of 1, the plain gradient
            batch["old_per_token_logps"] = batch["sampler_logps"]
        batch["num_items_in_batch"] = batch["completion_mask"].sum()
        if self.beta != 0.0:
            with self.phase("reference"):
                batch["ref_per_token_logps"] = self.reference_logps(batch)
        return batch

    @torch.no_grad()
    def reference_logps(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities [B, T] of the frozen reference: the base under an adapter, or TRL's own copy."""
        model = self.ref_model if self.ref_model is not None else self.model
        without_adapter = nullcontext() if self.ref_model is not None else self.policy.disable_adapter()
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        was_training = model.training
        model.eval()
        with without_adapter:
            logps, _, _ = self._get_per_token_logps_and_entropies(
                model, ids, mask, batch["completion_ids"].shape[1], batch_size=self.args.per_device_train_batch_size
            )
        model.train(was_training)
        return logps

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Log-probabilities and entropies [B, T] of the completion on the support that `rl.support` names."""
        parts = [
            self._token_logps(model, ids, mask, logits_to_keep)
            for ids, mask in zip(
                input_ids.split(batch_size or len(input_ids)),
                attention_mask.split(batch_size or len(input_ids)),
                strict=True,
            )
        ]
        logps_BT = torch.cat([logps for logps, _ in parts])
        self._logps = logps_BT.detach()
        return logps_BT, torch.cat([entropies for _, entropies in parts]), None

    def _token_logps(
        self, model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_BTV = self._completion_logits(model, input_ids, attention_mask, length) / self.temperature
        tokens_BT = input_ids[:, -length:]
        if self.config.rl.support == "trie":
            nodes = self.task.decoder.trie.walk(tokens_BT.cpu().numpy())[:, :-1]
            nodes_BT = torch.from_numpy(nodes).to(input_ids.device)
        else:
            nodes_BT = torch.full_like(tokens_BT, WHOLE_VOCABULARY)
        written = attention_mask[:, -length:].bool()
        logps, entropies = self.trie.token_logps(logits_BTV[written], nodes_BT[written], tokens_BT[written])
        blank = torch.zeros(tokens_BT.shape, device=logps.device)
        return blank.masked_scatter(written, logps), blank.masked_scatter(written, entropies)

    def _completion_logits(
        self, model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int
    ) -> torch.Tensor:
        """Logits [B, T, V] that predict each completion token; a group's prompt is computed once if `rl.packing`."""
        if not self.config.rl.packing:
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            with self.accelerator.autocast():
                output = model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=length + 1,
                )
            return output.logits[:, :-1]
        packed = pack_groups(input_ids, attention_mask, length, self.num_generations, self.policy.dtype)
        with self.accelerator.autocast():
            output = model(
                input_ids=packed.ids_MS,
                attention_mask=packed.mask_M1SS,
                position_ids=packed.positions_MS,
                use_cache=False,
                logits_to_keep=packed.keep,
            )
        return output.logits[:, packed.place_GT].flatten(0, 1)

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

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Slices of the buffered rollouts. TRL shuffles completions across groups here; ours stay whole, in order."""
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or not self._slices:
            batch = self._generate_and_score_completions(generation_batch)
            self._slices = split_tensor_dict(batch, self.args.steps_per_generation)
        return self._slices[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.phase("update"):
            loss = super()._compute_loss(model, inputs)
            if (
                self._step % (self.args.steps_per_generation * self.num_iterations)
                < self.args.gradient_accumulation_steps
            ):
                # No update since these rollouts were drawn: policy and sampler should be one distribution.
                gap = (self._logps - inputs["sampler_logps"]) * inputs["completion_mask"]
                self._ratio_errors.append(float(gap.exp().sub(1).abs().max()))
        return loss

    def evaluate_on_valid(self) -> None:
        """Beam search on the valid rows; its metrics stand in this step's line as `valid/...`."""
        evaluation = evaluate(self.policy, self.task, self.config, "valid", self.recorder.progress, "evaluate valid")
        for name, value in evaluation.flat().items():
            self.note(f"valid/{name}", float(value))

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; what is not a named phase counts as update."""
        start, named = time.perf_counter(), sum(self._seconds.values())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._seconds["update"] += time.perf_counter() - start - (sum(self._seconds.values()) - named)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add phases and the ratio error to each step's metrics and write them down."""
        stepped = "loss" in logs
        if stepped:
            for name, seconds in self._seconds.items():
                self.note(f"seconds/{name}", seconds)
            if self._ratio_errors:
                self.note("ratio_error", max(self._ratio_errors))
            self._seconds.clear()
            self._ratio_errors.clear()
        super().log(logs, start_time)
        if stepped:
            self.recorder.step(self.state.global_step, self.state.max_steps, logs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.recorder.checkpoint_complete(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    # Small parts ------------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> PreTrainedModel | PeftModel:
        """The model without accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    def note(self, name: str, value: float) -> None:
        """A metric of this step; TRL averages what is noted more than once."""
        self._metrics["train"][name].append(value)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds under a name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start


def _scored_in_groups(**_: Any) -> list[float]:
    """TRL wants a reward function; ours see whole groups, in `SidTrainer.score`, so this one is never called."""
    raise RuntimeError("rewards are scored in SidTrainer.score")


def rewards_of(scored: list[ScoredGroup]) -> np.ndarray:
    """Total rewards [P, G]."""
    return np.array([group.total for group in scored])


def _pad(rows: list[Any], value: float, left: bool = False) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor(
        [
            [value] * (longest - len(row)) + list(row) if left else list(row) + [value] * (longest - len(row))
            for row in rows
        ]
    )
