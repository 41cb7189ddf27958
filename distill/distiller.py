"""Texts that the student writes and what the teacher makes of them, as parts of a trainer's batch and loss.

Axes: B rows, P prompt positions, T text tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from configs.schema import RunConfig
from distill.losses import Divergence
from distill.scoring import Teacher, TextLoss, text_loss
from distill.vocabulary import SharedVocabulary, text_before_items
from rl.batch import Batch, pad_rows
from rl.general import General, TextPrompt, read_general, tokenise_general
from rl.task import Task, refuse_bad_rows
from rollout.hf_engine import open_policy
from rollout.ray_fleet import Fleet
from rollout.types import Sampling, Thought

PREFIX = "text_"
"""Of the names of a batch's tensors that belong to texts."""


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
        student_size = policy.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        if self.settings.teacher is None:
            self.teacher, tokenizer, size = Teacher.base_of(policy), task.tokenizer, student_size  # type: ignore[arg-type]
        else:
            model = open_policy(self.settings.teacher, config.model).to(device)
            self.teacher, size = Teacher.of(model), model.config.get_text_config().vocab_size
            tokenizer = AutoTokenizer.from_pretrained(self.settings.teacher)
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

    def batch(self, fleet: Fleet, step: int, seed: int) -> Batch:
        """Texts of a step, written by the fleet's current weights.

        `text_ids` and `text_mask` [B, P + T], `text_length` T and `text_counted`, the tokens that the loss is a mean
        of. Texts of one prompt stand beside each other. The prompts of a step are drawn from its seed alone.
        """
        rng = np.random.default_rng([self.config.seed, step, 3])
        chosen = [self.prompts[row] for row in rng.permutation(len(self.prompts))[: self.settings.prompts_per_step]]
        sampling = Sampling(1, temperature=self.sampling.temperature, thought=self.sampling.thought, seed=seed)
        texts = fleet.write(chosen, sampling, self.settings.texts_per_prompt)
        rows = [
            (prompt.prompt_ids, text.token_ids) for prompt, some in zip(chosen, texts, strict=True) for text in some
        ]
        pad = self.tokenizer.pad_token_id
        parts = [
            pad_rows([prompt for prompt, _ in rows], pad, left=True),
            pad_rows([text for _, text in rows], pad),
        ]
        masks = [
            pad_rows([[1] * len(prompt) for prompt, _ in rows], 0, left=True),
            pad_rows([[1] * len(text) for _, text in rows], 0),
        ]
        ids, mask = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
        length = parts[1].shape[1]
        text, item = text_before_items(self.shared.column_of(ids[:, -length:]), mask[:, -length:].bool())
        counted = int(text.sum()) + int(item.sum()) * (self.settings.item_tokens == "punish")
        named = {"ids": ids, "mask": mask, "length": torch.tensor(length), "counted": torch.tensor(max(counted, 1))}
        return {PREFIX + name: tensor for name, tensor in named.items()}

    def loss(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> TextLoss:
        """The share that a micro-batch of texts has in the loss of its whole batch."""
        found = text_loss(
            model,
            self.teacher,
            batch[f"{PREFIX}ids"].to(device),
            batch[f"{PREFIX}mask"].to(device),
            int(batch[f"{PREFIX}length"]),
            divergence=self.divergence,
            shared=self.shared,
            group=self.settings.texts_per_prompt if self.config.rl.packing else None,
            temperature=self.settings.temperature,
            item_tokens=self.settings.item_tokens,
        )
        return replace(found, loss=found.loss * found.tokens / int(batch[f"{PREFIX}counted"]))

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
