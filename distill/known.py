"""What a teacher in a process of its own says of texts: its likeliest tokens, and the tokens that were written.

A teacher's whole distribution is a vocabulary wide at each token; `top_k` and `sampled` need a few numbers of it, which
travel between processes.

Axes: B texts, T tokens of a text, K tokens of the teacher's top, N tokens, D hidden size, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from configs.schema import ModelConfig
from distill.vocabulary import SharedVocabulary
from rl.batch import prompted_rows
from rl.scoring import CHUNK, hidden_states
from rollout.hf_engine import open_policy
from rollout.output_layer import OutputLayer

Ids = Sequence[int]


@dataclass(frozen=True)
class Known:
    """A teacher's log-probabilities over the shared vocabulary, of one text.

    Attributes:
        columns: int32 [T, K], columns of its likeliest tokens, the likeliest first.
        logps: float32 [T, K], of those.
        written: float32 [T], of the tokens of the text.
    """

    columns: np.ndarray
    logps: np.ndarray
    written: np.ndarray


class KnowingTeacher(Protocol):
    """What is asked of a teacher in a process of its own."""

    def score(self, prompts: Sequence[Ids], texts: Sequence[Sequence[Ids]]) -> list[list[Known]]:
        """What it says of the texts after each prompt; all of them are of shared tokens."""
        ...


class HFTeacher:
    """A teacher computed by transformers.

    Args:
        path: its Hugging Face folder.
        model: how to load it.
        shared: what both can say.
        top_k: K.
        temperature: its logits are divided by it.
        batch: prompts computed at once.
    """

    def __init__(
        self, path: Path, model: ModelConfig, shared: SharedVocabulary, *, top_k: int, temperature: float, batch: int
    ) -> None:
        self.shared, self.top_k, self.temperature, self.batch = shared, top_k, temperature, batch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = open_policy(path, model).to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def score(self, prompts: Sequence[Ids], texts: Sequence[Sequence[Ids]]) -> list[list[Known]]:
        """What it says of the texts after each prompt."""
        known: list[list[Known]] = []
        for start in range(0, len(prompts), self.batch):
            stop = start + self.batch
            known += self._scored(prompts[start:stop], texts[start:stop])
        return known

    def _scored(self, prompts: Sequence[Ids], texts: Sequence[Sequence[Ids]]) -> list[list[Known]]:
        rows = [(prompt, text) for prompt, some in zip(prompts, texts, strict=True) for text in some if len(text)]
        scored = iter(self._known(rows) if rows else [])
        width = min(self.top_k, len(self.shared.ids))
        none = Known(np.zeros((0, width), np.int32), np.zeros((0, width), np.float32), np.zeros(0, np.float32))
        return [[next(scored) if len(text) else none for text in some] for some in texts]

    def _known(self, rows: list[tuple[Ids, Ids]]) -> list[Known]:
        device, pad = self.model.device, int(self.shared.ids[0])
        prompts, texts = zip(*rows, strict=True)
        ids, mask, length = prompted_rows(prompts, texts, pad)
        ids, mask = ids.to(device), mask.to(device)
        written_BT = mask[:, -length:].bool()
        hidden_ND = hidden_states(self.model, ids, mask, length, group=None)[written_BT]
        columns_N, head, found = self.shared.column_of(ids[:, -length:][written_BT]), OutputLayer(self.model), []
        size = max(1, CHUNK // self.shared.stop)
        for some_ND, some_N in zip(hidden_ND.split(size), columns_N.split(size), strict=True):
            logits_NV = self.shared.columns(head.logits(some_ND, 0, self.shared.stop)).float() / self.temperature
            logps_NV = logits_NV.log_softmax(dim=-1)
            top = logps_NV.topk(min(self.top_k, logps_NV.shape[1]), dim=1)
            found.append((top.indices.int().cpu(), top.values.cpu(), logps_NV.gather(1, some_N[:, None])[:, 0].cpu()))
        whole = [torch.cat(part).numpy() for part in zip(*found, strict=True)]
        ends = np.cumsum([len(text) for text in texts])[:-1]
        return [Known(*parts) for parts in zip(*(np.split(part, ends) for part in whole), strict=True)]
