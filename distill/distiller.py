"""Texts that the student writes and what the teacher makes of them, as parts of a trainer's batch and loss.

Axes: B rows, P prompt positions, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import RunConfig
from distill.losses import Divergence
from distill.ray_teachers import Teachers
from distill.scoring import Teacher, TextLoss, Told, text_loss
from distill.vocabulary import SharedVocabulary, text_before_items
from rl.batch import Batch, prompted_rows
from rl.general import General, TextPrompt, read_general, tokenise_general
from rl.task import Task, read_model, refuse_bad_rows
from rollout.hf_engine import open_policy
from rollout.ray_fleet import Fleet
from rollout.types import Sampling, Thought

PREFIX = "text_"
"""Of the names of a batch's tensors that belong to texts."""


@dataclass(frozen=True)
class Written:
    """Texts of a step.

    Attributes:
        prompts: tokens of each prompt.
        texts: tokens of each text after each.
        calls: what teachers in processes of their own have been asked.
    """

    prompts: list[tuple[int, ...]]
    texts: list[list[tuple[int, ...]]]
    calls: list[Any]


class Distiller:
    """Draws texts by the student's engines and scores them against a teacher.

    Args:
        config: the run's settings.
        task: the student's tokenizer and catalogue.
        policy: the student.
        device: where it is.

    Raises:
        ValueError: when teacher and student do not share their text vocabulary, or there are too few prompts.
        DataError: when prompts cannot be read, or rows are bad and `data.on_bad_rows` is stop.
    """

    def __init__(self, config: RunConfig, task: Task, policy: torch.nn.Module, device: torch.device) -> None:
        self.settings, self.config, self.tokenizer = config.distill, config, task.tokenizer
        path = Path(self.settings.teacher or task.model_path)
        known, tokenizer = read_model(path, "distill.teacher", config.model.trust_remote_code)
        size = known.get_text_config().vocab_size
        student_size = policy.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        items = np.concatenate([np.arange(first, stop) for first, stop in task.decoder.sid_tokens])
        self.shared = SharedVocabulary.of(task.tokenizer, tokenizer, student_size, size).without(items)
        self.banned = task.decoder.sid_tokens
        self.divergence = Divergence(
            self.settings.divergence, self.settings.beta, self.settings.top_k, -self.settings.low, self.settings.high
        )
        self.prompts = self._prompts()
        eos = task.tokenizer.eos_token_id
        self.sampling = Sampling(
            1, temperature=self.settings.temperature, thought=Thought(self.settings.max_tokens, int(eos))
        )
        self.teacher: Teacher | None = None
        self.teachers: Teachers | None = None
        if self.settings.teachers:
            self.teachers = Teachers(path, config, self.shared)
        elif self.settings.teacher is None:
            self.teacher = Teacher.base_of(policy)  # type: ignore[arg-type]
        else:
            self.teacher = Teacher.of(open_policy(path, config.model).to(device))

    def write(self, fleet: Fleet, step: int, seed: int) -> Written:
        """Texts of a step, written by the fleet's current weights; teachers in processes of their own are asked.

        The prompts of a step are drawn from its seed alone.
        """
        rng = np.random.default_rng([self.config.seed, step, 3])
        chosen = [self.prompts[row] for row in rng.permutation(len(self.prompts))[: self.settings.prompts_per_step]]
        sampling = replace(self.sampling, seed=seed)
        texts: list[list[tuple[int, ...]]] = []
        calls: list[Any] = []
        for some in fleet.write(chosen, sampling, self.settings.texts_per_prompt, parts=2 if self.teachers else 1):
            told = [[text.token_ids for text in of_prompt] for of_prompt in some]
            if self.teachers:
                asked = [prompt.prompt_ids for prompt in chosen[len(texts) : len(texts) + len(told)]]
                calls += self.teachers.ask(asked, [[self._readable(text) for text in texts] for texts in told])
            texts += told
        return Written([prompt.prompt_ids for prompt in chosen], texts, calls)

    def batch(self, written: Written) -> Batch:
        """Tensors of texts, those of one prompt beside each other.

        `text_ids` and `text_mask` [B, P + T], `text_length` T and `text_counted`, the tokens that the loss is a mean
        of; from teachers in processes of their own `text_columns` and `text_logps` [B, T, K], `text_written` [B, T].
        """
        rows = [(prompt, text) for prompt, texts in zip(written.prompts, written.texts, strict=True) for text in texts]
        prompts, texts = zip(*rows, strict=True)
        ids, mask, length = prompted_rows(prompts, texts, self.tokenizer.pad_token_id)
        text, item = text_before_items(self.shared.column_of(ids[:, -length:]), mask[:, -length:].bool())
        counted = int(text.sum()) + int(item.sum()) * (self.settings.item_tokens == "punish")
        named = {"ids": ids, "mask": mask, "length": torch.tensor(length), "counted": torch.tensor(max(counted, 1))}
        if self.teachers:
            told = [known for of_prompt in self.teachers.answers(written.calls) for known in of_prompt]
            for name in ("columns", "logps", "written"):
                arrays = [torch.from_numpy(getattr(known, name)) for known in told]
                filled = torch.zeros((len(told), length, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
                for row, array in zip(filled, arrays, strict=True):
                    row[: len(array)] = array
                named[name] = filled
        return {PREFIX + name: tensor for name, tensor in named.items()}

    def loss(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> TextLoss:
        """The share that a micro-batch of texts has in the loss of its whole batch."""

        def of(name: str) -> torch.Tensor:
            return batch[PREFIX + name].to(device)

        found = text_loss(
            model,
            self.teacher or Told(of("columns").long(), of("logps"), of("written")),
            of("ids"),
            of("mask"),
            int(of("length")),
            divergence=self.divergence,
            shared=self.shared,
            group=self.settings.texts_per_prompt if self.config.rl.packing else None,
            temperature=self.settings.temperature,
            item_tokens=self.settings.item_tokens,
        )
        return replace(found, loss=found.loss * found.tokens / int(of("counted")))

    def _readable(self, text: Sequence[int]) -> tuple[int, ...]:
        """A text up to its first item token."""
        outside = self.shared.column_of(torch.tensor(text)) < 0
        return tuple(text[: int(outside.int().argmax()) if bool(outside.any()) else len(text)])

    def _prompts(self) -> list[TextPrompt]:
        path = Path(self.settings.prompts)
        found, problems = read_general(path, self.settings.passage_words)
        refuse_bad_rows(problems, self.config, path)
        asked = [General(one.name, one.prompt) for one in found]
        ready, problems = tokenise_general(asked, self.tokenizer, self.settings.max_prompt_tokens, self.banned)
        refuse_bad_rows(problems, self.config, path)
        if len(ready) < self.settings.prompts_per_step:
            raise ValueError(
                f"distill.prompts_per_step={self.settings.prompts_per_step}, but {path} has {len(ready)} usable prompts"
            )
        return ready
