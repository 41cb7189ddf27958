"""The distillation loss of texts that a student wrote: two trunks, and output matrices multiplied a chunk at a time.

No [B, T, V] tensor is ever made, of neither model: hidden states are kept, logits of a chunk of positions are computed,
compared and dropped, with the gradient of their part of the loss taken at once.

Axes: B rows, T completion tokens, N counted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from distill.losses import Divergence
from distill.vocabulary import SharedVocabulary, text_before_items
from rl.scoring import hidden_states, sum_in_chunks
from rollout.output_layer import OutputLayer

ItemTokens = Literal["leave_out", "punish"]


MIN_ROWS, CHUNK = 128, 2**22
"""Fewest rows of a chunk, and most logits where more rows would exceed them: a few MB are fastest on CPU."""


def chunk_rows(vocab: int) -> int:
    """Positions whose logits are held at once."""
    return max(MIN_ROWS, CHUNK // vocab)


@dataclass(frozen=True)
class Teacher:
    """A model to learn from; it is never trained.

    Attributes:
        model: the model.
        shown: what makes it the teacher for a block (an adapter that is switched off); nothing as a rule.
    """

    model: torch.nn.Module
    shown: Callable[[], AbstractContextManager[None]] = nullcontext

    @classmethod
    def base_of(cls, student: PeftModel) -> Teacher:
        """The student without its adapter: a teacher that takes no memory."""

        @contextmanager
        def without_adapter() -> Iterator[None]:
            with student.disable_adapter():
                yield

        return cls(student, without_adapter)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Teacher:
        """A model of its own."""
        return cls(model.requires_grad_(False).eval())

    @torch.no_grad()
    def evidence(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        columns_BT: torch.Tensor,
        *,
        divergence: Divergence,
        shared: SharedVocabulary,
        group: int | None,
    ) -> tuple[torch.Tensor, ...]:
        """What `compare` needs of each token: hidden states [B, T, D] and the written token's column."""
        # What the teacher has no token for stands behind all that is compared: any token will do in its place.
        readable = torch.where(shared.column_of(input_ids) >= 0, input_ids, int(shared.ids[0]))
        with self.shown():
            return hidden_states(self.model, readable, attention_mask, columns_BT.shape[1], group=group), columns_BT

    def compare(
        self,
        student_NV: torch.Tensor,
        *evidence: torch.Tensor,
        divergence: Divergence,
        shared: SharedVocabulary,
        temperature: float,
    ) -> torch.Tensor:
        """The loss of each token, from the student's log-probabilities."""
        hidden_ND, columns_N = evidence
        with torch.no_grad(), self.shown():
            logits_NV = shared.columns(OutputLayer(self.model).logits(hidden_ND, 0, shared.stop)).float()
            known_NV = (logits_NV / temperature).log_softmax(dim=-1)
        return divergence(student_NV, known_NV, columns_N)


@dataclass(frozen=True)
class Told:
    """What a teacher in a process of its own has said of a batch of texts (`distill.known`), right-padded.

    Attributes:
        columns_BTK: columns of its likeliest tokens.
        logps_BTK: their log-probabilities over the shared vocabulary.
        written_BT: those of the written tokens.
    """

    columns_BTK: torch.Tensor
    logps_BTK: torch.Tensor
    written_BT: torch.Tensor

    def evidence(
        self, _ids: torch.Tensor, _mask: torch.Tensor, columns_BT: torch.Tensor, *, divergence: Divergence, **_: object
    ) -> tuple[torch.Tensor, ...]:
        """What `compare` needs of each token: the teacher's top, or the written token alone."""
        if divergence.kind == "top_k":
            return self.logps_BTK, self.columns_BTK
        return self.written_BT, columns_BT

    def compare(
        self, student_NV: torch.Tensor, *evidence: torch.Tensor, divergence: Divergence, **_: object
    ) -> torch.Tensor:
        """The loss of each token, from the student's log-probabilities."""
        logps, columns = evidence
        if divergence.kind == "top_k":
            return divergence.of_top(student_NV, logps, columns)
        return divergence.of_sampled(student_NV.gather(1, columns[:, None])[:, 0], logps)


@dataclass(frozen=True)
class TextLoss:
    """What distillation makes of a batch of texts.

    Attributes:
        loss: mean over the counted tokens, differentiable; 0 where none is counted.
        tokens: how many were counted.
        item_tokens: texts that went on into item tokens, of all.
        divergence: mean loss of the text tokens alone.
    """

    loss: torch.Tensor
    tokens: int
    item_tokens: float
    divergence: float


def text_loss(
    student: torch.nn.Module,
    teacher: Teacher | Told,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    length: int,
    *,
    divergence: Divergence,
    shared: SharedVocabulary,
    group: int | None = None,
    temperature: float = 1.0,
    item_tokens: ItemTokens = "leave_out",
) -> TextLoss:
    """The loss of the last `length` tokens of each row, which the student wrote.

    From a row's first item token on nothing is counted, for the teacher knows no such context. That first one itself is
    left out, or punished as `sampled` punishes what its teacher rules out: with the lowest advantage.

    Args:
        student: the model that is trained.
        teacher: the model it is compared with, or what that has said already (`top_k` and `sampled` alone).
        input_ids: left-padded prompts of shared tokens followed by right-padded texts [B, P + T].
        attention_mask: 1 on real tokens.
        length: T.
        divergence: the loss of a token.
        shared: what both can say.
        group: texts of one prompt that stand beside each other, to compute the prompt once; None computes each row.
        temperature: logits of both are divided by it.
        item_tokens: what becomes of an item token in a text.
    """
    tokens_BT, written_BT = input_ids[:, -length:], attention_mask[:, -length:].bool()
    columns_BT = shared.column_of(tokens_BT)
    text_BT, item_BT = text_before_items(columns_BT, written_BT)
    hidden_BTD = hidden_states(student, input_ids, attention_mask, length, group=group)
    head = OutputLayer(student)

    def said(hidden_ND: torch.Tensor) -> torch.Tensor:
        logits_NV = shared.columns(head.logits(hidden_ND, 0, shared.stop)).float() / temperature
        return logits_NV.log_softmax(dim=-1)

    def compare(hidden_ND: torch.Tensor, *evidence: torch.Tensor) -> torch.Tensor:
        return teacher.compare(
            said(hidden_ND), *evidence, divergence=divergence, shared=shared, temperature=temperature
        )

    evidence = teacher.evidence(
        input_ids, attention_mask, columns_BT, divergence=divergence, shared=shared, group=group
    )
    rows = hidden_BTD[text_BT], *(one[text_BT] for one in evidence)

    def punish(hidden_ND: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
        logits_NV = head.logits(hidden_ND, 0, shared.student_size).float() / temperature
        return -divergence.low * logits_NV.log_softmax(dim=-1).gather(1, tokens_N[:, None])[:, 0]

    total, count = sum_in_chunks(compare, rows, head.trained, chunk_rows(shared.stop)), len(rows[0])
    mean = float(total.detach()) / max(count, 1)
    if item_tokens == "punish" and bool(item_BT.any()):
        punished = hidden_BTD[item_BT], tokens_BT[item_BT]
        total = total + sum_in_chunks(punish, punished, head.trained, chunk_rows(shared.student_size))
        count += len(punished[0])
    share = float(item_BT.any(dim=1).float().mean())
    return TextLoss(total / max(count, 1), count, share, mean)
