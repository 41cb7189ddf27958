"""The distillation loss of texts that a student wrote: two trunks, and output matrices multiplied a chunk at a time.

No [B, T, V] tensor is ever made, of neither model: hidden states are kept, logits of a chunk of positions are computed,
compared and dropped, and computed again in the backward pass.

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
from rl.scoring import CHUNK, hidden_states, in_chunks
from rollout.output_layer import OutputLayer

ItemTokens = Literal["leave_out", "punish"]


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
    teacher: Teacher,
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
        teacher: the model it is compared with.
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
    # What the teacher has no token for stands behind all that is compared: any token will do in its place.
    readable = torch.where(shared.column_of(input_ids) >= 0, input_ids, int(shared.ids[0]))
    with torch.no_grad(), teacher.shown():
        known_BTD = hidden_states(teacher.model, readable, attention_mask, length, group=group)
        teacher_head = OutputLayer(teacher.model)
    head = OutputLayer(student)

    def compare(hidden_ND: torch.Tensor, known_ND: torch.Tensor, columns_N: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), teacher.shown():
            known_NV = shared.columns(teacher_head.logits(known_ND, 0, shared.stop)).float() / temperature
            known_NV = known_NV.log_softmax(dim=-1)
        said_NV = shared.columns(head.logits(hidden_ND, 0, shared.stop)).float() / temperature
        return divergence(said_NV.log_softmax(dim=-1), known_NV, columns_N)

    def punish(hidden_ND: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
        logits_NV = head.logits(hidden_ND, 0, shared.student_size).float() / temperature
        return -divergence.low * logits_NV.log_softmax(dim=-1).gather(1, tokens_N[:, None])[:, 0]

    losses_N = in_chunks(
        compare, (hidden_BTD[text_BT], known_BTD[text_BT], columns_BT[text_BT]), max(1, CHUNK // shared.stop)
    )
    total, count = losses_N.sum(), len(losses_N)
    mean = float(losses_N.detach().mean()) if count else 0.0
    if item_tokens == "punish" and bool(item_BT.any()):
        punished_N = in_chunks(punish, (hidden_BTD[item_BT], tokens_BT[item_BT]), max(1, CHUNK // shared.student_size))
        total, count = total + punished_N.sum(), count + len(punished_N)
    share = float(item_BT.any(dim=1).float().mean())
    return TextLoss(total / max(count, 1), count, share, mean)
