"""Which fields of `trl.GRPOConfig` and `peft.LoraConfig` a run may pass through, found without importing either.

`trl.X` sets the field X of `trl.GRPOConfig` and `lora.extra.X` the field X of `peft.LoraConfig`. A field that sidrl
sets itself has one place where it is set: OWNED_* names that setting. A field that would make sidrl do something other
than what it says has none: REFUSED_* says why. Field names are read from the installed sources with `ast`, since
importing the packages takes seconds; where they are not installed, names are checked when the real object is built.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

OWNED_TRL: dict[str, str] = {
    "output_dir": "output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "resume_from_checkpoint": "resume",
    "model_init_kwargs": "model.dtype and model.attention",
    "trust_remote_code": "model.trust_remote_code",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "bf16_full_eval": "model.dtype",
    "fp16_full_eval": "model.dtype",
    "use_cpu": "ray.trainer_gpus",
    "per_device_train_batch_size": "rl.micro_batch_groups and rollout.group_size",
    "gradient_accumulation_steps": "rl.prompts_per_step and rl.micro_batch_groups",
    "generation_batch_size": "rl.prompts_per_step",
    "steps_per_generation": "rl.prompts_per_step and rl.micro_batch_groups",
    "num_generations": "rollout.group_size",
    "temperature": "rollout.temperature",
    "reward_weights": "rewards",
    "max_steps": "rl.steps",
    "num_train_epochs": "rl.steps",
    "num_iterations": "rl.epochs_per_batch",
    "learning_rate": "rl.learning_rate",
    "lr_scheduler_type": "rl.lr_schedule",
    "warmup_steps": "rl.lr_warmup_steps",
    "beta": "rl.kl_coef",
    "sync_ref_model": "rl.sync_ref_every",
    "ref_model_sync_steps": "rl.sync_ref_every",
    "ref_model_mixup_alpha": "rl.sync_ref_mixup",
    "epsilon": "rl.clip_low",
    "epsilon_high": "rl.clip_high",
    "scale_rewards": "rl.scale_rewards",
    "max_grad_norm": "rl.max_grad_norm",
    "eval_strategy": "eval.every",
    "eval_steps": "eval.every",
    "eval_on_start": "eval.before",
    "eval_delay": "eval.every",
    "per_device_eval_batch_size": "eval.batch_prompts",
    "num_generations_eval": "eval.beam_width",
    "save_strategy": "output.checkpoint_every",
    "save_steps": "output.checkpoint_every",
    "save_total_limit": "output.keep_checkpoints",
}

_ENGINES = "rollouts are drawn by sidrl's own engines under the trie; see rollout.engine"
_DISTRIBUTION = (
    "rollouts are drawn from the very distribution that is improved, the policy under the trie; rollout.temperature is "
    "the one thing that shapes it"
)
_PACKED = "log-probabilities come from sidrl's packed forward pass, which this would bypass"

REFUSED_TRL: dict[str, str] = {
    "use_vllm": _ENGINES,
    "use_transformers_continuous_batching": _ENGINES,
    "transformers_continuous_batching_config": _ENGINES,
    "use_transformers_paged": _ENGINES,
    "cache_implementation": _ENGINES,
    "top_p": _DISTRIBUTION,
    "top_k": _DISTRIBUTION,
    "min_p": _DISTRIBUTION,
    "repetition_penalty": _DISTRIBUTION,
    "generation_kwargs": _DISTRIBUTION,
    "max_completion_length": "the catalogue's Sids say how long a completion is",
    "remove_unused_columns": "rows carry their targets and tasks, so no column may be removed",
    "logging_strategy": "every step is logged",
    "logging_steps": "every step is logged",
    "multi_objective_aggregation": "rewards are combined as the weighted sum that `rewards` lists",
    "mask_truncated_completions": "an item is written whole or is illegal; there is nothing to truncate",
    "log_completions": "rollouts are written by sidrl; see output.rollouts_every",
    "log_unique_prompts": "rollouts are written by sidrl; see output.rollouts_every",
    "num_completions_to_print": "rollouts are written by sidrl; see output.rollouts_every",
    "log_completions_hub_repo": "rollouts are written by sidrl; see output.rollouts_every",
    "use_liger_kernel": _PACKED,
    "liger_kernel_config": _PACKED,
    "auto_find_batch_size": "a micro-batch holds whole groups; set rl.micro_batch_groups",
}

OWNED_LORA: dict[str, str] = {
    "r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.target_modules",
    "base_model_name_or_path": "model.path",
}

REFUSED_LORA: dict[str, str] = {
    "task_type": "the policy is always a causal language model",
    "peft_type": "the adapter is always LoRA",
    "inference_mode": "the adapter is trained",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
}

_GRPO_SOURCES = (
    ("trl", "trainer/grpo_config.py", "GRPOConfig"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)
_LORA_SOURCES = (
    ("peft", "tuners/lora/config.py", "LoraConfig"),
    ("peft", "config.py", "PeftConfig"),
    ("peft", "config.py", "PeftConfigMixin"),
)


def trl_reason(field: str) -> str | None:
    """Why `trl.<field>` may not be set, or None where it may."""
    if field.startswith("vllm_"):
        return _ENGINES
    return _reason(field, OWNED_TRL, REFUSED_TRL)


def lora_reason(field: str) -> str | None:
    """Why `lora.extra.<field>` may not be set, or None where it may."""
    return _reason(field, OWNED_LORA, REFUSED_LORA)


def _reason(field: str, owned: dict[str, str], refused: dict[str, str]) -> str | None:
    if field in owned:
        return f"set {owned[field]} instead"
    return refused.get(field)


def grpo_fields() -> frozenset[str] | None:
    """Field names of the installed `trl.GRPOConfig`, or None where its sources are not found."""
    return _dataclass_fields(_GRPO_SOURCES)


def lora_fields() -> frozenset[str] | None:
    """Field names of the installed `peft.LoraConfig`, or None where its sources are not found."""
    return _dataclass_fields(_LORA_SOURCES)


@cache
def _dataclass_fields(sources: tuple[tuple[str, str, str], ...]) -> frozenset[str] | None:
    names: set[str] = set()
    for package, file, cls in sources:
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or []) if spec else []
        path = next((Path(folder, file) for folder in folders if Path(folder, file).is_file()), None)
        if path is None:
            return None
        module = ast.parse(path.read_text(encoding="utf-8"))
        body = next((node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == cls), None)
        if body is None:
            return None
        names |= {
            node.target.id
            for node in body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_init_field(node)
        }
    return frozenset(names)


def _is_init_field(node: ast.AnnAssign) -> bool:
    """Can the field be passed to the constructor: no ClassVar, no `field(init=False)`?"""
    if "ClassVar" in ast.unparse(node.annotation):
        return False
    keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
    return not any(k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in keywords)
