"""SFT through TRL: the warm-up of small policies, the control that RL is compared with, and all of `examples`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset

from configs.schema import WarmupConfig
from rl.general import TextPrompt
from rollout.decode import Decoder
from rollout.types import Sample

IGNORED = -100


def next_item_rows(samples: list[Sample], decoder: Decoder) -> Dataset:
    """One row per target: the prompt without loss, then the target's SID tokens with loss."""
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for sample in samples:
        for sid in sorted({int(decoder.catalog.sid_index_N[item]) for item in sample.targets}):
            path = list(decoder.path_of(sid))
            rows["input_ids"].append([*sample.prompt_ids, *path])
            rows["labels"].append([IGNORED] * len(sample.prompt_ids) + path)
    return Dataset.from_dict(rows)


def answer_rows(general: Sequence[TextPrompt]) -> Dataset:
    """One row per general prompt: without loss on the prompt, with loss on its answer."""
    return Dataset.from_dict(
        {
            "input_ids": [[*row.prompt_ids, *row.answer_ids] for row in general],
            "labels": [[IGNORED] * len(row.prompt_ids) + list(row.answer_ids) for row in general],
        }
    )


def packed(rows: Dataset, length: int) -> Dataset:
    """Rows one after another, cut anew into rows of so many tokens: no token is padding, and none is lost."""
    return pack_dataset(rows, length, "wrapped")


class _Report(TrainerCallback):
    def __init__(self, report: Callable[[int, int, dict[str, float]], None]) -> None:
        self.report = report

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        self.report(state.global_step, state.max_steps, logs or {})


def sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Sample],
    valid: list[Sample],
    decoder: Decoder,
    config: WarmupConfig,
    folder: Path,
    *,
    seed: int,
    report: Callable[[int, int, dict[str, float]], None],
    general: Sequence[TextPrompt] = (),
) -> PreTrainedModel:
    """Train on next items; the model with the lowest loss on valid is returned.

    Args:
        model: the policy, changed in place.
        tokenizer: its tokenizer.
        train: samples to learn from.
        valid: samples that decide when to stop.
        decoder: catalogue and trie.
        config: epochs, patience, sizes of steps.
        folder: scratch folder for checkpoints.
        seed: order of the rows, dropout.
        report: called with (step, steps, logs) as it goes.
        general: general prompts whose answers are learned too, mixed in.
    """
    rows = next_item_rows(train, decoder)
    if general:
        rows = concatenate_datasets([rows, answer_rows(general)])
    steps_per_epoch = -(-len(rows) // config.batch_size)
    every = max(1, steps_per_epoch // config.evals_per_epoch)
    if config.max_steps:
        every = min(every, config.max_steps)
    trainer = train_rows(
        model,
        tokenizer,
        rows,
        next_item_rows(valid, decoder),
        folder,
        report=report,
        callbacks=[EarlyStoppingCallback(config.patience)],
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=min(20, steps_per_epoch),
        eval_steps=every,
        save_steps=every,
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, every // 4),
        seed=seed,
        data_seed=seed,
    )
    return trainer.model


def train_rows(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    valid: Dataset,
    folder: Path,
    *,
    report: Callable[[int, int, dict[str, float]], None],
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    **arguments: Any,
) -> SFTTrainer:
    """Supervised training on rows of token ids and labels, by TRL; the model is changed in place.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        rows: `input_ids` and `labels`, -100 where nothing is learned.
        valid: the same, evaluated every `eval_steps`.
        folder: where checkpoints go.
        report: called with (step, steps, logs) as it goes.
        callbacks: of transformers.
        resume: go on from the newest checkpoint of the folder.
        arguments: further fields of `trl.SFTConfig`.
    """
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        **arguments,
    }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **settings),
        train_dataset=rows,
        eval_dataset=valid,
        processing_class=tokenizer,
        callbacks=[*callbacks, _Report(report)],
    )
    trainer.remove_callback(PrinterCallback)  # what transformers prints where it shows no bar; `report` tells people
    trainer.train(resume_from_checkpoint=resume)
    return trainer
