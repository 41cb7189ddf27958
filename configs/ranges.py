"""Numbers that each setting takes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Numbers that a setting takes; an open end excludes its number; `auto` is one more number with a meaning."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    auto: float | None = None
    why: str = ""

    def __contains__(self, value: float) -> bool:
        if value == self.auto:
            return True
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            words = f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
        else:
            left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
            words = f"in {left}{self.low:g}, {self.high:g}{right}"
        words += f", or {self.auto:g}" if self.auto is not None else ""
        return words + (f": {self.why}" if self.why else "")


POSITIVE = Range(0, low_open=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1)
SHARE_BELOW_1 = Range(0, 1, high_open=True)
GPUS = Range(0, auto=-1)

RANGES: dict[str, Range] = {
    "seed": Range(0, 2**32 - 1),
    "data.max_history": COUNT,
    "data.max_prompt_tokens": COUNT,
    "data.rl_users": SHARE_BELOW_1,
    "warmup.hidden_size": COUNT,
    "warmup.layers": COUNT,
    "warmup.heads": COUNT,
    "warmup.epochs": COUNT,
    "warmup.patience": COUNT,
    "warmup.evals_per_epoch": COUNT,
    "warmup.batch_size": COUNT,
    "warmup.learning_rate": POSITIVE,
    "warmup.weight_decay": NOT_NEGATIVE,
    "warmup.dropout": SHARE_BELOW_1,
    "warmup.max_steps": NOT_NEGATIVE,
    "rollout.num_engines": COUNT,
    "rollout.group_size": Range(2, why="advantages compare rollouts of one group"),
    "rollout.temperature": POSITIVE,
    "rollout.top_p": Range(0, 1, low_open=True),
    "rollout.items_per_completion": COUNT,
    "rollout.max_staleness": NOT_NEGATIVE,
    "rollout.prompts_per_call": NOT_NEGATIVE,
    "rollout.max_batch_prompts": COUNT,
    "thought.max_tokens": NOT_NEGATIVE,
    "thought.rollouts": COUNT,
    "thought.penalty": NOT_NEGATIVE,
    "rollout.kv_cache_gb": COUNT,
    "rollout.gpu_memory_utilization": Range(0, 1, low_open=True),
    "rollout.cpus_per_engine": NOT_NEGATIVE,
    "rollout.gpus_per_engine": GPUS,
    "rollout.threads": NOT_NEGATIVE,
    "rl.steps": COUNT,
    "rl.prompts_per_step": COUNT,
    "rl.micro_batch_groups": COUNT,
    "rl.epochs_per_batch": COUNT,
    "rl.refill_rounds": NOT_NEGATIVE,
    "rl.learning_rate": POSITIVE,
    "rl.lr_warmup_steps": NOT_NEGATIVE,
    "rl.kl_coef": NOT_NEGATIVE,
    "rl.sync_ref_every": NOT_NEGATIVE,
    "rl.sync_ref_mixup": Range(0, 1, low_open=True),
    "rl.average_decay": SHARE_BELOW_1,
    "rl.sft_coef": NOT_NEGATIVE,
    "rl.prefix_credit": NOT_NEGATIVE,
    "rl.ranking_length": COUNT,
    "rl.clip_low": SHARE_BELOW_1,
    "rl.clip_high": NOT_NEGATIVE,
    "rl.max_grad_norm": NOT_NEGATIVE,
    "critic.learning_rate": POSITIVE,
    "critic.gamma": Range(0, 1),
    "critic.lam": Range(0, 1),
    "critic.clip": POSITIVE,
    "critic.coef": NOT_NEGATIVE,
    "critic.hidden_size": COUNT,
    "critic.layers": COUNT,
    "critic.heads": COUNT,
    "distill.every": NOT_NEGATIVE,
    "distill.teachers": NOT_NEGATIVE,
    "distill.gpus_per_teacher": GPUS,
    "distill.weight": NOT_NEGATIVE,
    "distill.recommendation": NOT_NEGATIVE,
    "distill.prompts_per_step": COUNT,
    "distill.texts_per_prompt": COUNT,
    "distill.max_tokens": COUNT,
    "distill.max_prompt_tokens": COUNT,
    "distill.passage_words": COUNT,
    "distill.temperature": POSITIVE,
    "distill.beta": Range(0, 1, low_open=True, high_open=True),
    "distill.top_k": COUNT,
    "distill.low": NOT_NEGATIVE,
    "distill.high": NOT_NEGATIVE,
    "lora.r": COUNT,
    "lora.alpha": COUNT,
    "lora.dropout": SHARE_BELOW_1,
    "eval.every": NOT_NEGATIVE,
    "eval.beam_width": COUNT,
    "eval.max_samples": NOT_NEGATIVE,
    "eval.batch_prompts": COUNT,
    "eval.bootstrap": COUNT,
    "eval.unconstrained_samples": NOT_NEGATIVE,
    "eval.general_words": Range(2, why="half of a passage is judged by the other"),
    "ray.trainer_cpus": NOT_NEGATIVE,
    "ray.trainer_gpus": GPUS,
    "output.rollouts_every": NOT_NEGATIVE,
    "output.checkpoint_every": NOT_NEGATIVE,
    "output.keep_checkpoints": COUNT,
}
