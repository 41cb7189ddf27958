"""What can be set about the policy update: the loss, the critic, distillation and the adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class RLConfig:
    """The policy update.

    Args:
        steps: Optimizer steps (one batch of rollouts each).
        prompts_per_step: Prompts per step; each brings `rollout.group_size` rollouts.
        micro_batch_groups: Groups per forward and backward pass; must divide `prompts_per_step`.
        epochs_per_batch: Passes over each batch of rollouts.
        learning_rate: Peak learning rate.
        lr_schedule: Schedule of transformers: linear, cosine, constant, constant_with_warmup and others.
        lr_warmup_steps: Steps of linear warm-up of the learning rate.
        kl_coef: Weight of the KL divergence to the reference (k3 estimator, times the importance ratio unless
            `trl.use_bias_correction_kl` is false); 0 needs no reference.
        clip_low: The importance ratio is clipped at 1 - clip_low from below.
        clip_high: The importance ratio is clipped at 1 + clip_high from above.
        scale_rewards: Divide advantages by the standard deviation of the group, of the batch, or not at all.
        refill_rounds: Groups whose rollouts all earn the same teach nothing: replace them by fresh prompts, so many
            times at most (DAPO's dynamic sampling); 0 keeps them.
        sync_ref_every: The reference follows the policy every so many steps; 0 keeps it as the policy was at the start.
        sync_ref_mixup: Share of the policy when the reference follows.
        average_decay: Decay of a running average of the trained weights. The average is what is evaluated and kept;
            rollouts come from the weights themselves. 0 keeps the last weights.
        inject_targets: Where no rollout of a group is a target, put one in place of the last rollout.
        sft_coef: Weight of the targets' negative log-likelihood, added to the loss: each prompt's target rides along as
            one more branch of its packed group. Holds the list together while the reward sharpens its top.
        prefix_credit: Reward paid at each level of an item but the last on which its codes so far are still those of a
            target. Advantages then are per token, of what is still to be earned.
        inclusion_weights: With `rollout.sampler: unique`, weigh rollouts by the inverse of the probability that they
            are in their group, which makes the policy gradient unbiased; false treats them like independent draws.
        ranking_length: Items of a ranking of `--algo pl` where the row names no candidates.
        support: Distribution of policy and reference at SID positions: trie (what is sampled and deployed) or full
            (the whole vocabulary, as peers do; biased, for comparison).
        packing: Compute a group's prompt once, its completions beside each other under a tree attention mask; false
            computes a row per completion (for models that take no 4-D masks).
        max_grad_norm: Gradients are clipped to this norm; 0 clips nothing.
    """

    steps: int = 100
    prompts_per_step: int = 64
    micro_batch_groups: int = 16
    epochs_per_batch: int = 1
    learning_rate: float = 1e-3
    lr_schedule: str = "constant_with_warmup"
    lr_warmup_steps: int = 5
    kl_coef: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    scale_rewards: Literal["group", "batch", "none"] = "group"
    refill_rounds: int = 0
    sync_ref_every: int = 0
    sync_ref_mixup: float = 0.6
    average_decay: float = 0.0
    inject_targets: bool = False
    sft_coef: float = 0.0
    prefix_credit: float = 0.0
    inclusion_weights: bool = False
    ranking_length: int = 10
    support: Literal["trie", "full"] = "trie"
    packing: bool = True
    max_grad_norm: float = 1.0


@dataclass
class CriticConfig:
    """The critic of `--algo ppo`.

    Args:
        kind: head reads the policy's own hidden states; model is a small transformer of its own.
        learning_rate: Peak learning rate of the critic; it follows the schedule of `rl.lr_schedule`.
        gamma: Discount of later rewards.
        lam: λ of generalised advantage estimation: 1 trusts returns alone, 0 the critic alone.
        clip: Values may move so far from those at the time of the rollouts.
        coef: Weight of the value loss.
        detach: A head leaves the policy's trunk alone; false lets the value loss train it too.
        hidden_size: Width of a model of its own.
        layers: Layers of a model of its own.
        heads: Attention heads of a model of its own.
    """

    kind: Literal["head", "model"] = "head"
    learning_rate: float = 1e-3
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    coef: float = 0.5
    detach: bool = True
    hidden_size: int = 64
    layers: int = 2
    heads: int = 2


@dataclass
class DistillConfig:
    """On-policy distillation (`python -m distill.train`): general ability comes back while the student writes text.

    Args:
        prompts: General prompts: a Parquet, JSON, JSON-lines or text file, or a folder of them.
        teacher: Folder of the teacher; unset takes the student's own base, without its adapter.
        teachers: Processes (Ray actors) of the teacher, of the kind of `rollout.engine`: they score texts while others
            are written, and give `divergence` top_k and sampled what they need. 0 computes the teacher beside the
            student, for every divergence.
        gpus_per_teacher: GPUs of a teacher's process; -1 takes its share of what the cluster has.
        every: Distil in every N-th step, and train by `algo` in the others; 1 distils only, 0 distils in no step of its
            own.
        weight: Weight of the texts' loss in the steps of `algo`; with 0 those steps have no texts.
        recommendation: Weight of recommendation prompts in a run of distillation alone: on rollouts of
            `rl.prompts_per_step` rows the student is held to what it was at the start, so that its lists stay.
        prompts_per_step: Prompts of a step.
        texts_per_prompt: Texts that the student writes after each.
        max_tokens: Longest text.
        max_prompt_tokens: Longest prompt; a longer one is a bad row.
        passage_words: Words of a passage of a plain text, which the student continues.
        temperature: Temperature at which texts are written and compared.
        divergence: What is minimised; see `distill/losses.py`.
        beta: Of jsd: weight of the teacher in the mixture, in (0, 1).
        top_k: Of top_k: the teacher's likeliest tokens.
        low: Of sampled: advantages are clamped to [-low, high].
        high: Of sampled: the highest advantage.
        item_tokens: An item token in a text ends what is compared; it is itself left out, or punished with the lowest
            advantage.
    """

    prompts: str = ""
    teacher: str | None = None
    teachers: int = 0
    gpus_per_teacher: float = -1.0
    every: int = 0
    weight: float = 0.0
    recommendation: float = 0.0
    prompts_per_step: int = 16
    texts_per_prompt: int = 1
    max_tokens: int = 64
    max_prompt_tokens: int = 256
    passage_words: int = 24
    temperature: float = 1.0
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "top_k", "sampled"] = "reverse_kl"
    beta: float = 0.5
    top_k: int = 64
    low: float = 30.0
    high: float = 5.0
    item_tokens: Literal["leave_out", "punish"] = "leave_out"


@dataclass
class LoraConfig:
    """LoRA through PEFT.

    Args:
        enabled: Train an adapter; false trains all weights.
        r: Rank.
        alpha: Scale; the update is multiplied by alpha / r.
        dropout: Dropout on the adapter's input.
        target_modules: Names of the layers that get an adapter, or `all-linear`.
        extra: Any other field of `peft.LoraConfig`.
    """

    enabled: bool = True
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    extra: dict[str, Any] = field(default_factory=dict)
