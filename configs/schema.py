"""What can be set, as nested dataclasses: the field docstrings are the help texts of `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from configs.update import CriticConfig, DistillConfig, LoraConfig, RLConfig


@dataclass
class ModelConfig:
    """The policy.

    Args:
        path: Hugging Face folder (or hub id) of the policy. Unset: a small policy is warmed up on the data first and
            cached (see `warmup`).
        dtype: Type of weights and arithmetic; auto is float32 on CPU and bfloat16 on GPU.
        attention: Attention code of transformers. sdpa and eager take 4-D masks; flex_attention skips their empty
            blocks and needs a GPU to train (it has no backward pass on CPU).
        trust_remote_code: Run Python code that comes with the model folder.
    """

    path: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["sdpa", "eager", "flex_attention"] = "sdpa"
    trust_remote_code: bool = False


@dataclass
class DataConfig:
    """Catalogue and rows.

    Args:
        path: Folder of the data; `demo` is the built-in world.
        format: Format of the folder; auto looks at its files.
        prompt_template: Prompt of rows that bring none; `{history}` is the user's items as Sids, oldest first, and
            `{titles}` their titles.
        max_history: Newest items of the history that stay in the prompt.
        max_prompt_tokens: Longest prompt; a longer one is a bad row.
        on_bad_rows: stop refuses to train on data with bad rows; skip leaves them out and says how many.
        exclude_history: Items of a row's history may not be recommended for it, in training and evaluation.
        rl_users: Share of the training users kept aside from the warm-up; RL trains on their rows alone. 0 trains both
            on all rows.
    """

    path: str = "demo"
    format: Literal["auto", "sidrl", "minionerec", "openonerec"] = "auto"
    prompt_template: str = "{history}\n"
    max_history: int = 10
    max_prompt_tokens: int = 512
    on_bad_rows: Literal["stop", "skip"] = "stop"
    exclude_history: bool = False
    rl_users: float = 0.4


@dataclass
class WarmupConfig:
    """The small policy that is trained from scratch by next-item SFT when `model.path` is unset.

    Args:
        hidden_size: Width of the model.
        layers: Number of layers.
        heads: Attention heads.
        epochs: Most passes over the rows; training stops earlier when the loss on valid stops falling.
        patience: Evaluations without a better loss on valid before it stops.
        evals_per_epoch: Evaluations on valid in each pass.
        batch_size: Rows per step.
        learning_rate: Peak learning rate (AdamW, linear decay).
        weight_decay: Decoupled weight decay.
        dropout: Dropout on attention weights.
        max_steps: Stops after so many steps whatever else is set; 0 sets no limit.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    epochs: int = 20
    patience: int = 3
    evals_per_epoch: int = 2
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    dropout: float = 0.1
    max_steps: int = 0


@dataclass
class RolloutConfig:
    """How rollouts are drawn.

    Args:
        engine: vllm, hf (Hugging Face), or auto: vllm where it can be imported, else hf.
        num_engines: Engines, each a Ray actor; prompts are spread over them.
        group_size: Rollouts per prompt, G.
        sampler: sample draws G independent items under the trie; beam takes the G best distinct items; unique draws G
            distinct items without replacement.
        temperature: Sampling temperature; the same one divides the logits in the update.
        top_p: `sample` draws each token from the fewest likeliest of its support that hold this share of its mass; the
            importance ratio is then to this narrower distribution, not 1.
        items_per_completion: Items of a completion, all different and in order: a slate. Rewards see it as a list.
        max_staleness: Batches that rollouts may be behind the policy: they are drawn while earlier batches update it,
            and the importance ratio corrects for it. 0 is exactly on-policy.
        prompts_per_call: Prompts an engine is asked for at once: rewards of one call run while the next is drawn. 0
            asks each engine for its whole share.
        sync: How new weights reach the engines: merged (LoRA folded into full weights) or adapter (vLLM's LoRA).
        max_batch_prompts: Prompts that the hf engine computes at once.
        kv_cache_gb: Memory for vLLM's key-value cache on CPU.
        gpu_memory_utilization: Share of a GPU's memory that vLLM may take.
        cpus_per_engine: CPUs that Ray counts for an engine when it places it.
        gpus_per_engine: GPUs of an engine; -1 takes 1 where the cluster has GPUs and 0 where it has none.
        threads: CPU threads of an engine; 0 takes `$OMP_NUM_THREADS` or all (engines and trainer take turns), or its
            share of them where `max_staleness` lets engines and trainer run at once.
    """

    engine: Literal["auto", "vllm", "hf"] = "auto"
    num_engines: int = 1
    group_size: int = 16
    sampler: Literal["sample", "beam", "unique"] = "sample"
    temperature: float = 1.0
    top_p: float = 1.0
    items_per_completion: int = 1
    max_staleness: int = 0
    prompts_per_call: int = 0
    sync: Literal["merged", "adapter"] = "merged"
    max_batch_prompts: int = 64
    kv_cache_gb: int = 1
    gpu_memory_utilization: float = 0.4
    cpus_per_engine: float = 1.0
    gpus_per_engine: float = -1.0
    threads: int = 0


@dataclass
class ThoughtConfig:
    """Free text that the policy writes before its items.

    Args:
        max_tokens: Tokens a thought may have; one that has not ended then is closed by force. 0 writes no thoughts.
        tasks: Tasks whose rows think; empty for all. The others go straight to their items, in the same batches.
        open: Text that opens a thought, put at the end of the prompt.
        end: The token that ends it; empty takes the begin mark of the Sid format.
        close: Text that is set between that token and the item (the begin mark needs no mention).
        rollouts: Items (or slates) that continue each thought; divides `rollout.group_size`. With more than one,
            advantages are nested: an item's compares it with the others of its thought, a thought's with the others.
        item_tokens: Whether a thought may hold the tokens of Sids.
        unfinished: What becomes of rollouts whose thought was closed by force: keep them, mask them (no gradient), or
            penalise them.
        penalty: What `penalise` takes from the reward.
    """

    max_tokens: int = 0
    tasks: list[str] = field(default_factory=list)
    open: str = ""
    end: str = ""
    close: str = ""
    rollouts: int = 1
    item_tokens: bool = False
    unfinished: Literal["keep", "mask", "penalise"] = "keep"
    penalty: float = 1.0


@dataclass
class RewardConfig:
    """One reward of the weighted sum.

    Args:
        reward: Built-in or entry-point name such as `ndcg@10`, or `package.module:Name`, or `path/to/file.py:Name`.
        weight: Factor in the sum.
        name: Name in metrics and files; empty takes the value of `reward`.
        params: Keyword arguments of the reward.
    """

    reward: str = "ndcg@10"
    weight: float = 1.0
    name: str = ""
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvalConfig:
    """Deployed-style evaluation by constrained beam search.

    Args:
        split: Rows to evaluate on.
        before: Evaluate before training.
        after: Evaluate after training.
        every: Also evaluate on valid every so many steps; 0 never.
        beam_width: Items per list.
        max_samples: Evaluate on the first so many rows; 0 takes all.
        batch_prompts: Prompts computed at once.
        bootstrap: Resamples of the 95 % intervals.
        unconstrained_samples: Rows on which the policy writes one item without the trie, to see how many are legal.
        general: General prompts with answers, a file or folder as `distill.prompts`: every evaluation also tells their
            perplexity and the share of answers met to the letter, so that forgetting shows. Empty tells nothing.
        general_words: Words of a passage of a plain text there; the second half of each is judged.
    """

    split: Literal["valid", "test"] = "test"
    before: bool = True
    after: bool = True
    every: int = 0
    beam_width: int = 50
    max_samples: int = 0
    batch_prompts: int = 64
    bootstrap: int = 1000
    unconstrained_samples: int = 512
    general: str = ""
    general_words: int = 48


@dataclass
class RayConfig:
    """Where the run's processes live.

    Args:
        address: Cluster to join. Unset joins the cluster the run was submitted to, or starts Ray on this machine.
        trainer_cpus: CPUs that Ray counts for the trainer.
        trainer_gpus: GPUs of the trainer; -1 takes 1 where the cluster has more GPUs than engines need, else 0.
    """

    address: str | None = None
    trainer_cpus: float = 1.0
    trainer_gpus: float = -1.0


@dataclass
class OutputConfig:
    """What a run writes besides metrics and summary.

    Args:
        rollouts_every: Write every rollout of each so-many-th step as Parquet; 0 never.
        checkpoint_every: Write a checkpoint every so many steps; 0 only at the end.
        keep_checkpoints: Newest checkpoints that are kept.
        merged_model: Also write the merged model in Hugging Face format.
    """

    rollouts_every: int = 10
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    merged_model: bool = False


@dataclass
class RunConfig:
    """RL post-training of a recommender that writes semantic ids.

    Args:
        algo: Algorithm; its defaults are in the file of the same name under `configs/algo/`.
        output_dir: Folder of the run; unset makes `runs/<algo>-<date>-<time>`.
        resume: Folder of an earlier run to continue from its newest whole checkpoint; its settings are the defaults.
        seed: Seed of everything that is drawn.
        dry_run: Check data, model, tokens, rewards and cluster, print the settings and the plan, train nothing.
        model: The policy.
        data: Catalogue and rows.
        warmup: The policy that is made when `model.path` is unset.
        rollout: How rollouts are drawn.
        thought: Free text before the items.
        rewards: Weighted list of rewards.
        rl: The policy update.
        critic: The critic of ppo.
        distill: On-policy distillation.
        lora: LoRA through PEFT.
        eval: Evaluation before and after.
        ray: Where the processes live.
        output: What a run writes.
        trl: Any other field of `trl.GRPOConfig`.
    """

    algo: Literal["grpo", "dr_grpo", "rloo", "gspo", "cispo", "dapo", "gpg", "ppo", "pl"] = "grpo"
    output_dir: str | None = None
    resume: str | None = None
    seed: int = 0
    dry_run: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    thought: ThoughtConfig = field(default_factory=ThoughtConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    rl: RLConfig = field(default_factory=RLConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    trl: dict[str, Any] = field(default_factory=dict)
