"""Training stages: alignment of new rows alone, co-pretraining of everything, SFT on chats; by LoRA or in full.

One function serves all of them: what differs is what may change, and what is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, PreTrainedModel, set_seed
from transformers.integrations import TensorBoardCallback

from examples.pretrain.sources import RowMaker, Source, mixture, read_source
from examples.stages import appearing
from rl.progress import Progress
from rl.task import read_model
from rl.trl_sft import train_rows
from rollout.data.problems import DataError

EXPANSION = "expansion.json"
"""Beside a model whose vocabulary was expanded: `first` and `tokens` of the new rows."""


@dataclass(frozen=True)
class StageSettings:
    """A stage of training.

    Args:
        model: Hugging Face folder to start from.
        out: folder of the run: `model`, `checkpoints`, `tensorboard`.
        sources: what is read, with weights.
        train: new_rows trains the rows of item tokens alone (the model stays as it is to the bit), all everything, lora
            an adapter on every linear layer.
        first_token: first of the new rows; unset reads it from the model's `expansion.json`.
        max_length: tokens of a row.
        packing: fill rows up with several texts, one after another.
        think: answers without a thought start with an empty one.
        all_turns: learn what users and system say too, not the assistant alone.
        valid_share: share of the rows that is kept to judge by.
        on_bad_rows: stop, or leave them out and say how many.
        epochs: passes over the rows.
        max_steps: stops after so many steps whatever else is set; 0 sets no limit.
        batch_size: rows of a step on a device.
        accumulate: steps whose gradients are added up.
        learning_rate: peak learning rate.
        lr_schedule: schedule of transformers.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled weight decay (new_rows takes none).
        lora_r: rank of lora.
        lora_alpha: scale of lora.
        evaluate_every: steps between evaluations.
        save_every: steps between checkpoints; a multiple of `evaluate_every` with `patience`.
        patience: evaluations without a better loss before it stops; the best model is kept. 0 keeps the last.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        dtype: float32 or bfloat16; auto is bfloat16 on GPU.
        seed: of everything that is drawn.
        resume: go on from the newest checkpoint in `out`.
    """

    model: Path
    out: Path
    sources: list[Source] = field(default_factory=list)
    train: Literal["new_rows", "all", "lora"] = "all"
    first_token: int | None = None
    max_length: int = 2048
    packing: bool = True
    think: bool = False
    all_turns: bool = False
    valid_share: float = 0.02
    on_bad_rows: Literal["stop", "skip"] = "stop"
    epochs: float = 1.0
    max_steps: int = 0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-4
    lr_schedule: str = "cosine"
    warmup_steps: int = 20
    weight_decay: float = 0.01
    lora_r: int = 16
    lora_alpha: int = 32
    evaluate_every: int = 200
    save_every: int = 200
    patience: int = 0
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources=[] must name at least one: {path: FOLDER, weight: 1}")
        if not 0 < self.valid_share < 1:
            raise ValueError(f"valid_share={self.valid_share} must be in (0, 1)")
        for name in ("max_length", "batch_size", "accumulate", "evaluate_every", "save_every", "lora_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.patience and self.save_every % self.evaluate_every:
            raise ValueError(f"save_every={self.save_every} must be a multiple of evaluate_every={self.evaluate_every}")


def run_stage(settings: StageSettings, progress: Progress) -> Path:
    """Train a stage; returns the folder of the model, in Hugging Face format, any adapter merged.

    Raises:
        DataError: when a source cannot be read, or rows are bad and `on_bad_rows` is stop.
        ValueError: when settings do not fit the model.
    """
    final = settings.out / "model"
    if final.exists():
        raise ValueError(f"{final} is there already; name a new folder")
    if not settings.resume and (settings.out / "checkpoints").exists():
        raise ValueError(f"{settings.out} holds checkpoints: go on from them with resume, or name a new folder")
    set_seed(settings.seed)
    _, tokenizer = read_model(settings.model, "model")
    maker = RowMaker(tokenizer, think=settings.think, all_turns=settings.all_turns, max_length=settings.max_length)
    train, valid = [], []
    for source in settings.sources:
        rows, problems = read_source(source, maker)
        for problem in problems[:10]:
            progress.say(f"{'bad row' if settings.on_bad_rows == 'stop' else 'left out'}: {problem}")
        if problems and settings.on_bad_rows == "stop":
            raise DataError(f"{source.path}: {len(problems)} bad rows; mend them, or leave them out: on_bad_rows=skip")
        kept = max(1, round(settings.valid_share * len(rows)))
        if kept >= len(rows):
            raise DataError(f"{source.path}: {len(rows)} rows are too few to train on and judge by")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        valid.append(([rows[row] for row in order[:kept]], source.weight))
        train.append(([rows[row] for row in order[kept:]], source.weight))
        progress.say(f"{source.path}: {len(rows):,} rows, {len(problems)} left out, weight {source.weight:g}")
    shape = {"max_length": settings.max_length, "packing": settings.packing, "seed": settings.seed}
    rows, judged = (mixture(part, **shape) for part in (train, valid))  # type: ignore[arg-type]
    on_gpu = torch.cuda.is_available()
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and on_gpu)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    model = trainable(model, settings)
    progress.say(f"{len(rows):,} rows of up to {settings.max_length} tokens; {describe(model)}")
    early = [EarlyStoppingCallback(settings.patience)] if settings.patience else []
    board = TensorBoardCallback(SummaryWriter(str(settings.out / "tensorboard")))
    trainer = train_rows(
        model, tokenizer, rows, judged, settings.out / "checkpoints", resume=settings.resume, callbacks=[board, *early],
        report=lambda step, steps, logs: progress.update(settings.train, step, steps, logs),
        num_train_epochs=settings.epochs, max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size, per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate, learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_schedule, warmup_steps=settings.warmup_steps,
        weight_decay=0.0 if settings.train == "new_rows" else settings.weight_decay,
        eval_steps=settings.evaluate_every, save_steps=settings.save_every, save_total_limit=2, logging_steps=10,
        load_best_model_at_end=bool(early),
        metric_for_best_model="eval_loss", greater_is_better=False,
        gradient_checkpointing=settings.gradient_checkpointing, bf16=half,
        train_sampling_strategy="random" if settings.packing else "group_by_length",
        seed=settings.seed, data_seed=settings.seed,
    )  # fmt: skip
    whole = trainer.model.merge_and_unload() if isinstance(trainer.model, PeftModel) else trainer.model
    appearing(final, lambda folder: _save(whole, tokenizer, settings, folder))
    return final


def trainable(model: PreTrainedModel, settings: StageSettings) -> PreTrainedModel | PeftModel:
    """The model with what this stage trains, and nothing else, set free.

    Raises:
        ValueError: when new rows are to be trained and nobody says which they are.
    """
    if settings.train == "all":
        return model
    if settings.train == "lora":
        shape = {"r": settings.lora_r, "lora_alpha": settings.lora_alpha}
        return get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **shape))
    tokens = new_tokens(settings.model, settings.first_token)
    if not tokens:
        raise ValueError(f"{settings.model} has no {EXPANSION}: say where the new rows start with first_token")
    model.requires_grad_(False)
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:  # one weight where they are tied
        layer.weight.requires_grad_(True)
    for weight in {id(one): one for one in model.parameters() if one.requires_grad}.values():
        # AdamW without weight decay leaves a row without gradient as it is, to the bit.
        weight.register_hook(partial(_keep_rows, tokens))
    return model


def _keep_rows(tokens: range, gradient_VD: torch.Tensor) -> torch.Tensor:
    kept_VD = torch.zeros_like(gradient_VD)
    kept_VD[tokens.start : tokens.stop] = gradient_VD[tokens.start : tokens.stop]
    return kept_VD


def new_tokens(model: Path, first: int | None) -> range:
    """Ids of the item tokens of a model's folder; empty where it does not say and `first` is unset."""
    file = Path(model) / EXPANSION
    if first is not None:
        return range(first, len(AutoTokenizer.from_pretrained(model)))
    if not file.exists():
        return range(0)
    told = json.loads(file.read_text())
    return range(told["first"], told["first"] + told["tokens"])


def describe(model: torch.nn.Module) -> str:
    """How much of a model is trained, for people."""
    free = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"{free / 1e6:.2f}M of {total / 1e6:.2f}M parameters train"


def _save(model: PreTrainedModel, tokenizer: object, settings: StageSettings, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    file = settings.model / EXPANSION
    if file.exists():
        (folder / EXPANSION).write_text(file.read_text())
