"""How far the student is from the teacher, token by token, on the vocabulary that both have.

s and t are the student's and the teacher's distributions of the next token over the shared vocabulary, each of mass 1
there; y is the token that the student wrote. All are minimised over s; t is fixed.

- `reverse_kl`: Σ_v s_v (log s_v - log t_v). Mode-seeking (MiniLLM, arXiv 2306.08543); the usual one on-policy.
- `forward_kl`: Σ_v t_v (log t_v - log s_v). Mass-covering (Hinton et al., arXiv 1503.02531).
- `jsd`: β Σ_v t_v (log t_v - log m_v) + (1 - β) Σ_v s_v (log s_v - log m_v) with m = β t + (1 - β) s (GKD, arXiv
  2306.13649, eq. 1).
- `top_k`: the reverse KL between (s_1 … s_k, rest) and (t_1 … t_k, rest), k tokens likeliest to the teacher. A lower
  bound of `reverse_kl`, exact at k = V, that needs k numbers of a teacher.
- `sampled`: -A log s_y with A = clamp(log t_y - log s_y, low, high) held constant: the policy gradient of the reverse
  KL by one sample, as in OpenOneRec, whose A lies in [-30, 5].

Axes: N tokens, V shared vocabulary, K tokens of the teacher's top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Kind = Literal["reverse_kl", "forward_kl", "jsd", "top_k", "sampled"]


@dataclass(frozen=True)
class Divergence:
    """One of the losses above.

    Attributes:
        kind: which one.
        beta: of `jsd`, in (0, 1).
        top_k: of `top_k`: how many of the teacher's likeliest tokens.
        low: lowest advantage of `sampled`.
        high: highest advantage of `sampled`.
    """

    kind: Kind = "reverse_kl"
    beta: float = 0.5
    top_k: int = 64
    low: float = -30.0
    high: float = 5.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(get_args(Kind))}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta={self.beta} must be in (0, 1); its ends are forward_kl (0) and reverse_kl (1)")
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if not self.low <= 0 <= self.high:
            raise ValueError(f"advantages are clamped to [low, high] around 0; got [{self.low}, {self.high}]")

    def __call__(self, student_NV: torch.Tensor, teacher_NV: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
        """Loss of each token [N].

        Args:
            student_NV: log-probabilities of the student, float32, differentiable.
            teacher_NV: log-probabilities of the teacher.
            tokens_N: columns of the tokens that the student wrote.
        """
        losses: dict[Kind, Callable[[], torch.Tensor]] = {
            "reverse_kl": lambda: _kl(student_NV, teacher_NV),
            "forward_kl": lambda: _kl(teacher_NV, student_NV),
            "jsd": lambda: self._jsd(student_NV, teacher_NV),
            "top_k": lambda: self.of_top(student_NV, *teacher_NV.topk(min(self.top_k, teacher_NV.shape[1]), dim=1)),
            "sampled": lambda: self.of_sampled(_at(student_NV, tokens_N), _at(teacher_NV, tokens_N)),
        }
        return losses[self.kind]()

    def of_top(self, student_NV: torch.Tensor, teacher_NK: torch.Tensor, tokens_NK: torch.Tensor) -> torch.Tensor:
        """`top_k`, from the teacher's K likeliest tokens (columns) and their log-probabilities alone."""
        mine_NK = student_NV.gather(1, tokens_NK)
        kept_N = (mine_NK.exp() * (mine_NK - teacher_NK)).sum(dim=1)
        if tokens_NK.shape[1] == student_NV.shape[1]:
            return kept_N
        mine_rest_N, other_rest_N = _log_rest(mine_NK), _log_rest(teacher_NK)
        return kept_N + mine_rest_N.exp() * (mine_rest_N - other_rest_N)

    def of_sampled(self, student_N: torch.Tensor, teacher_N: torch.Tensor) -> torch.Tensor:
        """`sampled`, from the log-probabilities of the written tokens alone."""
        advantage_N = (teacher_N - student_N.detach()).clamp(self.low, self.high)
        return -advantage_N * student_N

    def _jsd(self, student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
        mixed_NV = torch.logaddexp(teacher_NV + math.log(self.beta), student_NV + math.log(1 - self.beta))
        return self.beta * _kl(teacher_NV, mixed_NV) + (1 - self.beta) * _kl(student_NV, mixed_NV)


def _kl(one_NV: torch.Tensor, other_NV: torch.Tensor) -> torch.Tensor:
    """Σ p (log p - log q) of each row; tokens that p rules out count nothing."""
    gap_NV = torch.where(one_NV.isneginf(), 0.0, one_NV - other_NV)
    return (one_NV.exp() * gap_NV).sum(dim=1)


def _at(logps_NV: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    return logps_NV.gather(1, tokens_N[:, None])[:, 0]


def _log_rest(logps_NK: torch.Tensor) -> torch.Tensor:
    """log(1 - Σ p) of each row, kept finite where rounding leaves nothing."""
    rest_N = 1 - logps_NK.exp().sum(dim=1)
    return rest_N.clamp(min=torch.finfo(logps_NK.dtype).eps).log()
