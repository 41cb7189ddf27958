"""Settings of a run as TRL's and PEFT's arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, set_seed
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
        "beta": 0.0,  # the trainer's own reference serves rl.kl_coef
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


def with_adapter(model: PreTrainedModel, config: RunConfig) -> PreTrainedModel | PeftModel:
    """The model with a fresh LoRA adapter, or itself for full fine-tuning."""
    lora = config.lora
    if not lora.enabled:
        return model
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        **lora.extra,
    )
    set_seed(config.seed)  # the adapter's first matrix is random
    return get_peft_model(model, settings)


@contextmanager
def adapter_on_output_layer_allowed(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Show TRL the bare output layer for a block.

    It refuses an adapter there, because its own loss multiplies by the bare layer's weight; `rl.scoring` does not.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        yield
        return
    model.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        del model.get_output_embeddings


def adapter_config(model: PeftModel) -> str:
    """PEFT's `adapter_config.json` as text."""
    settings = model.peft_config[model.active_adapter].to_dict()
    return json.dumps({key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()})
