"""Settings of a run as TRL's and PEFT's arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from trl import GRPOConfig

from configs.schema import RunConfig
from rl.algorithms import Algorithm


def grpo_arguments(config: RunConfig, algorithm: Algorithm, folder: Path, *, completion: int, bf16: bool) -> GRPOConfig:
    """TRL's arguments of a run; `trl` of the configuration overrides what this project does not set itself.

    Args:
        config: the run's settings.
        algorithm: names the loss.
        folder: where checkpoints go.
        completion: tokens of a completion, by which Dr. GRPO's loss is divided.
        bf16: train in bfloat16.
    """
    rl, group = config.rl, config.rollout.group_size
    settings: dict[str, Any] = {
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "loss_type": algorithm.loss_type,
        "importance_sampling_level": algorithm.ratio_level,
        **config.trl,
        "output_dir": str(folder),
        "seed": config.seed,
        "max_steps": rl.steps,
        "per_device_train_batch_size": rl.micro_batch_groups * group,
        "gradient_accumulation_steps": rl.prompts_per_step // rl.micro_batch_groups,
        "num_generations": group,
        "num_iterations": rl.epochs_per_batch,
        "max_completion_length": completion,
        "temperature": config.rollout.temperature,
        "learning_rate": rl.learning_rate,
        "lr_scheduler_type": rl.lr_schedule,
        "warmup_steps": rl.lr_warmup_steps,
        "beta": rl.kl_coef,
        "epsilon": rl.clip_low,
        "epsilon_high": rl.clip_high,
        "scale_rewards": rl.scale_rewards,
        "max_grad_norm": rl.max_grad_norm,
        "bf16": bf16,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": config.output.checkpoint_every or rl.steps,
        "save_total_limit": config.output.keep_checkpoints,
        "remove_unused_columns": False,
    }
    return GRPOConfig(**settings)


def peft_arguments(config: RunConfig) -> PeftLoraConfig | None:
    """PEFT's LoRA settings, or None for full fine-tuning."""
    lora = config.lora
    if not lora.enabled:
        return None
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        **lora.extra,
    )


def adapter_config(model: PeftModel) -> str:
    """PEFT's `adapter_config.json` as text."""
    settings = model.peft_config[model.active_adapter].to_dict()
    return json.dumps({key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()})
