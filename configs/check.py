"""What must hold between settings beyond their types; every problem is told at once."""

from __future__ import annotations

import importlib.util
import math
import string
from collections import Counter
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from configs.keys import leaf_types, suggestion
from configs.passthrough import grpo_fields, lora_fields, lora_reason, trl_reason
from configs.ranges import RANGES
from configs.schema import RunConfig, ThoughtConfig
from configs.update import CriticConfig, DistillConfig, RLConfig


class ConfigError(ValueError):
    """Settings that cannot be honoured; `problems` holds one line for each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)
"""Names of transformers' SchedulerType, but for those that follow a metric of its own evaluation loop."""

METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")

PROMPT_FIELDS = ("history", "titles")

VLLM_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vLLM 0.32 computes on CPU; a GPU's kernels take these and more."""


def check(config: RunConfig) -> None:
    """Raise ConfigError with every problem of `config`, each naming its settings and their values."""
    parts = (
        _ranges,
        _texts,
        _prompt,
        _warmup,
        _rollout,
        _thought,
        _distill,
        _rewards,
        _policy_update,
        _critic,
        _ranking,
        _passthrough,
    )
    problems = [problem for part in parts for problem in part(config)]
    if problems:
        raise ConfigError(problems)


def _value(config: RunConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _ranges(config: RunConfig) -> Iterator[str]:
    for key, numbers in RANGES.items():
        value = _value(config, key)
        if value not in numbers:
            yield f"{key}={value} must be {numbers}"


def _texts(config: RunConfig) -> Iterator[str]:
    for key in ("model.path", "output_dir", "resume", "ray.address"):
        if _value(config, key) == "":
            yield f"{key}='' must name something; unset it with null"
    if config.resume and config.output_dir and Path(config.resume).absolute() != Path(config.output_dir).absolute():
        yield f"output_dir={config.output_dir} and resume={config.resume}: a resumed run goes on in its own folder"
    if config.data.path == "":
        yield "data.path='' must name a folder, or demo"


def _prompt(config: RunConfig) -> Iterator[str]:
    template = config.data.prompt_template
    allowed = " and ".join(f"{{{name}}}" for name in PROMPT_FIELDS)
    try:
        pieces = [piece for piece in string.Formatter().parse(template) if piece[1] is not None]
    except ValueError as error:
        yield f"data.prompt_template={template!r} is no template ({error}); write a brace itself as {{{{ or }}}}"
        return
    for _, name, spec, conversion in pieces:
        written = f"{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
        if written not in PROMPT_FIELDS:
            yield f"data.prompt_template={template!r} holds {{{written}}}; its fields are {allowed}"
    if not pieces:
        yield f"data.prompt_template={template!r} must hold {allowed.replace('and', 'or')}: else all prompts are alike"


def _warmup(config: RunConfig) -> Iterator[str]:
    width, heads = config.warmup.hidden_size, config.warmup.heads
    if width < 1 or heads < 1:
        return
    if width % heads or width // heads % 2:
        yield f"warmup.hidden_size={width} must be an even multiple of warmup.heads={heads}"
    elif config.model.path is None and _takes_vllm(config.rollout.engine) and width // heads not in VLLM_HEAD_SIZES:
        yield (
            f"warmup.hidden_size={width} / warmup.heads={heads} = {width // heads} must be one of "
            f"{', '.join(map(str, VLLM_HEAD_SIZES))}, the head sizes of vLLM on CPU; or set rollout.engine=hf"
        )


def _takes_vllm(engine: str) -> bool:
    return engine == "vllm" or (engine == "auto" and importlib.util.find_spec("vllm") is not None)


def _rollout(config: RunConfig) -> Iterator[str]:
    sampler, top_p, items = config.rollout.sampler, config.rollout.top_p, config.rollout.items_per_completion
    if sampler != "sample" and 0 < top_p < 1:
        yield f"rollout.top_p={top_p} shapes rollout.sampler=sample only, and it is {sampler}"
    if config.rollout.max_staleness and config.algo in ("gpg", "pl"):
        why = (
            "has no importance ratio to correct for it"
            if config.algo == "gpg"
            else "draws its rankings when it needs them"
        )
        yield f"rollout.max_staleness={config.rollout.max_staleness}: algo={config.algo} {why}; set 0"
    if items > 1:
        if sampler != "sample":
            yield f"rollout.items_per_completion={items} needs rollout.sampler=sample, and it is {sampler}"
        if config.algo == "pl":
            yield f"rollout.items_per_completion={items} is not for algo=pl: its rankings have rl.ranking_length items"
        if config.rl.inject_targets:
            yield f"rl.inject_targets puts one item in a rollout's place, and rollout.items_per_completion={items}"
    if config.rollout.sync != "adapter":
        return
    if not config.lora.enabled:
        yield "rollout.sync=adapter needs lora.enabled=true: without LoRA there is no adapter to send"
    if config.rollout.engine == "hf":
        yield "rollout.sync=adapter needs vLLM, and rollout.engine=hf: the hf engine takes rollout.sync=merged"


def _thought(config: RunConfig) -> Iterator[str]:
    thought, size = config.thought, config.rollout.group_size
    if not thought.max_tokens:
        if thought != ThoughtConfig(max_tokens=0):
            yield "thought.max_tokens=0 writes no thoughts, and other settings of thought are set"
        return
    if thought.rollouts >= 1 and size % thought.rollouts:
        yield f"thought.rollouts={thought.rollouts} must divide rollout.group_size={size}"
    if thought.rollouts == size:
        yield f"thought.rollouts={thought.rollouts} leaves one thought a prompt: it has no other to be compared with"
    if config.algo == "pl":
        yield f"thought.max_tokens={thought.max_tokens} is not for algo=pl: it ranks items, not texts"
    for key in ("rl.sft_coef", "rl.inject_targets"):
        if _value(config, key):
            yield f"{key} puts targets after the prompt, where thought.max_tokens={thought.max_tokens} puts text"
    if thought.rollouts > 1:
        if config.rl.prefix_credit:
            yield f"rl.prefix_credit and thought.rollouts={thought.rollouts} both make advantages per token: take one"
        if config.algo == "ppo":
            yield f"thought.rollouts={thought.rollouts}: the critic of algo=ppo gives advantages of its own; set 1"


def _distill(config: RunConfig) -> Iterator[str]:
    settings = config.distill
    if not settings.every and not settings.weight:
        if settings != DistillConfig():
            yield "distill.every=0 and distill.weight=0 distil nothing, and other settings of distill are set"
        return
    if not settings.prompts:
        yield "distill.prompts is unset: distillation needs general prompts (a Parquet, JSON or text file)"
    if settings.teachers and settings.divergence not in ("top_k", "sampled"):
        yield (
            f"distill.divergence={settings.divergence} needs the teacher's whole distribution, which "
            f"distill.teachers={settings.teachers} processes do not send: take top_k or sampled, or distill.teachers=0"
        )
    if settings.teacher is None and not config.lora.enabled and not settings.teachers:
        yield "distill.teacher is unset, which takes the base under the adapter, and lora.enabled=false: name a teacher"
    if settings.weight and config.algo == "pl":
        yield f"distill.weight={settings.weight} is not for algo=pl, whose loss is that of rankings; take distill.every"
    if settings.every == 1 and settings.weight:
        yield f"distill.every=1 leaves no step of {config.algo} for distill.weight={settings.weight} to be mixed into"
    if settings.recommendation and settings.every != 1:
        yield (
            f"distill.recommendation={settings.recommendation} holds recommendations as they are, and "
            f"distill.every={settings.every} trains them by {config.algo}: it is for distill.every=1"
        )
    if settings.recommendation and (config.rollout.sampler != "sample" or config.rollout.top_p < 1):
        yield (
            f"distill.recommendation={settings.recommendation} needs the policy's own draws: rollout.sampler="
            f"{config.rollout.sampler} must be sample, and rollout.top_p={config.rollout.top_p} must be 1"
        )
    if settings.every and config.rollout.max_staleness:
        yield f"distill.every={settings.every} and rollout.max_staleness={config.rollout.max_staleness}: take one"
    groups, prompts = config.rl.micro_batch_groups, config.rl.prompts_per_step
    if groups >= 1 and settings.prompts_per_step % max(1, prompts // groups):
        yield (
            f"distill.prompts_per_step={settings.prompts_per_step} must be a multiple of the {prompts // groups} "
            "micro-batches of a step (rl.prompts_per_step / rl.micro_batch_groups)"
        )


def _rewards(config: RunConfig) -> Iterator[str]:
    if not config.rewards:
        yield "rewards=[] must hold at least one reward, such as {reward: ndcg@10}"
    for index, reward in enumerate(config.rewards):
        if not reward.reward:
            yield f"rewards[{index}].reward='' must name a reward, such as ndcg@10"
        if not math.isfinite(reward.weight):
            yield f"rewards[{index}].weight={reward.weight} must be a finite number"
    counts = Counter(reward.name or reward.reward for reward in config.rewards)
    for name, count in counts.items():
        if count > 1:
            yield f"rewards hold {count} named {name!r}: give each its own `name`"
    if config.rewards and all(reward.weight == 0 for reward in config.rewards):
        yield "rewards have weight=0 throughout: at least one must count"


def _policy_update(config: RunConfig) -> Iterator[str]:
    groups, prompts = config.rl.micro_batch_groups, config.rl.prompts_per_step
    if groups >= 1 and prompts >= 1 and prompts % groups:
        yield f"rl.micro_batch_groups={groups} must divide rl.prompts_per_step={prompts}"
    passes = config.rl.epochs_per_batch
    for key in ("rl.steps", "output.checkpoint_every"):
        if passes >= 1 and _value(config, key) % passes:
            yield (
                f"{key}={_value(config, key)} must be a multiple of rl.epochs_per_batch={passes}: "
                "a checkpoint keeps no rollouts"
            )
    if config.rl.inclusion_weights:
        if config.rollout.sampler != "unique" or config.algo in ("ppo", "pl"):
            yield (
                "rl.inclusion_weights=true is for items drawn without replacement: it needs rollout.sampler=unique (it "
                f"is {config.rollout.sampler}) and an algorithm that compares the group (algo={config.algo})"
            )
        for key, off in (("rl.prefix_credit", 0), ("rl.inject_targets", False), ("thought.rollouts", 1)):
            if _value(config, key) != off:
                yield f"rl.inclusion_weights and {key} both make the advantages: take one"
    if config.rl.sync_ref_every and not config.rl.kl_coef:
        yield f"rl.sync_ref_every={config.rl.sync_ref_every} needs rl.kl_coef > 0: without it there is no reference"
    schedule = config.rl.lr_schedule
    if schedule in METRIC_SCHEDULES:
        yield f"rl.lr_schedule={schedule!r} follows a metric that RL does not have; take one of {', '.join(SCHEDULES)}"
    elif schedule not in SCHEDULES:
        hint = suggestion(schedule, SCHEDULES)
        yield f"rl.lr_schedule={schedule!r} must be one of {', '.join(SCHEDULES)}{'; ' + hint if hint else ''}"


def _critic(config: RunConfig) -> Iterator[str]:
    if config.algo != "ppo":
        for name, value in vars(config.critic).items():
            if value != getattr(CriticConfig(), name):
                yield f"critic.{name}={value} is for algo=ppo, and algo={config.algo} has no critic"
    width, heads = config.critic.hidden_size, config.critic.heads
    if width >= 1 and heads >= 1 and (width % heads or width // heads % 2):
        yield f"critic.hidden_size={width} must be an even multiple of critic.heads={heads}"


def _ranking(config: RunConfig) -> Iterator[str]:
    rl, default = config.rl, RLConfig()
    if config.algo != "pl":
        if rl.ranking_length != default.ranking_length:
            yield f"rl.ranking_length={rl.ranking_length} is for algo=pl, and algo={config.algo} draws no rankings"
        return
    if config.rollout.sampler != "unique":
        yield f"algo=pl draws rankings without replacement; rollout.sampler={config.rollout.sampler} must be unique"
    for name in ("kl_coef", "sft_coef", "prefix_credit", "inject_targets", "support"):
        if getattr(rl, name) != getattr(default, name):
            yield f"rl.{name}={getattr(rl, name)} has no meaning for whole rankings (algo=pl): leave it out"


def _passthrough(config: RunConfig) -> Iterator[str]:
    yield from _fields("trl", config.trl, "trl.GRPOConfig", trl_reason, grpo_fields)
    yield from _fields("lora.extra", config.lora.extra, "peft.LoraConfig", lora_reason, lora_fields)


def _fields(
    key: str,
    given: dict[str, Any],
    target: str,
    reason_of: Callable[[str], str | None],
    known_fields: Callable[[], frozenset[str] | None],
) -> Iterator[str]:
    known = known_fields() if given else None
    for name in given:
        reason = reason_of(name)
        if reason:
            yield f"{key}.{name} may not be set: {reason}"
        elif known is not None and name not in known:
            settings = {setting.rpartition(".")[2]: setting for setting in leaf_types()}
            hint = suggestion(name, known)
            if not hint and name in settings:
                hint = f"did you mean the setting {settings[name]}?"
            yield f"{key}.{name} is no field of {target}{'; ' + hint if hint else ''}"
