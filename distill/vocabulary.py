"""What student and teacher both can say: text tokens, by the same ids in both; item tokens are the student's alone.

Axes: B rows, T tokens, V shared vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SharedVocabulary:
    """Token ids that student and teacher share.

    Attributes:
        ids: int64 [V], ascending.
        student_size: token ids that the student has.
    """

    ids: np.ndarray
    student_size: int

    @classmethod
    def of(
        cls,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        student_size: int,
        teacher_size: int,
    ) -> SharedVocabulary:
        """Every token of the teacher; the student must write each of them by the same id.

        Args:
            student: the student's tokenizer.
            teacher: the teacher's tokenizer.
            student_size: rows of the student's output matrix.
            teacher_size: rows of the teacher's; rows without a token (padding of the matrix) are not shared.

        Raises:
            ValueError: naming tokens that the student lacks or writes by another id.
        """
        mine = student.get_vocab()
        shared = {token: token_id for token, token_id in teacher.get_vocab().items() if token_id < teacher_size}
        wrong = [(token, token_id) for token, token_id in shared.items() if mine.get(token) != token_id]
        if wrong:
            shown = ", ".join(
                f"{token!r} is {token_id} there and {mine.get(token)} here" for token, token_id in wrong[:5]
            )
            raise ValueError(
                f"{len(wrong)} of {len(shared)} tokens of the teacher are other tokens of the student ({shown}): their "
                "distributions cannot be compared; take a teacher with the student's text vocabulary"
            )
        ids = np.array(sorted(shared.values()), dtype=np.int64)
        if ids[-1] >= student_size:
            raise ValueError(f"the student's output matrix has {student_size} rows, the teacher uses token {ids[-1]}")
        return cls(ids, student_size)

    def without(self, tokens: np.ndarray) -> SharedVocabulary:
        """The same less some tokens: items that the teacher happens to know too are no text all the same."""
        return SharedVocabulary(np.setdiff1d(self.ids, tokens), self.student_size)

    @cached_property
    def stop(self) -> int:
        """One more than the largest shared id: the rows of an output matrix that are needed."""
        return int(self.ids[-1]) + 1

    def columns(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """The shared columns of logits of the tokens 0 to `stop`."""
        if len(self.ids) == self.stop:  # no gaps, as where items were added behind the text
            return logits_NV
        return logits_NV[:, torch.from_numpy(self.ids).to(logits_NV.device)]

    def column_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Column of each token, -1 where it is not shared."""
        return self._columns.to(tokens.device)[tokens]

    @cached_property
    def _columns(self) -> torch.Tensor:
        table = torch.full((self.student_size,), -1)
        table[torch.from_numpy(self.ids)] = torch.arange(len(self.ids))
        return table


def text_before_items(columns_BT: torch.Tensor, written_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are text, and which is the first that is not.

    Once the student has written an item token, what follows is no text that the teacher could judge.

    Args:
        columns_BT: column of each token in the shared vocabulary, -1 for none.
        written_BT: which tokens the student wrote.

    Returns:
        masks [B, T]: tokens before the first item token, and that one.
    """
    outside_BT = (columns_BT < 0) & written_BT
    before_BT = outside_BT.int().cumsum(dim=1) - outside_BT.int()
    clean_BT = before_BT == 0
    return written_BT & clean_BT & ~outside_BT, outside_BT & clean_BT
