"""Divergences by hand, against plain sums in double precision, and what their gradients are."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from distill.losses import Divergence

KINDS = ["reverse_kl", "forward_kl", "jsd", "top_k", "sampled"]
HALVES, QUARTERS = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
FIRST = torch.tensor([0])


def logps(seed: int, rows: int = 6, size: int = 11, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, size, generator=generator) * spread).log_softmax(dim=1)


def plain(kind: str, s: list[float], t: list[float], y: int, beta: float, k: int) -> float:
    """The formulas of the docstring, in Python floats."""

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)

    if kind == "reverse_kl":
        return kl(s, t)
    if kind == "forward_kl":
        return kl(t, s)
    if kind == "jsd":
        m = [beta * b + (1 - beta) * a for a, b in zip(s, t, strict=True)]
        return beta * kl(t, m) + (1 - beta) * kl(s, m)
    if kind == "top_k":
        top = sorted(range(len(t)), key=lambda v: -t[v])[:k]
        rest = [v for v in range(len(t)) if v not in top]
        return kl([s[v] for v in top] + [sum(s[v] for v in rest)], [t[v] for v in top] + [sum(t[v] for v in rest)])
    advantage = max(-1.0, min(0.5, math.log(t[y]) - math.log(s[y])))
    return -advantage * math.log(s[y])


def test_by_hand() -> None:
    """Student (1/2, 1/2), teacher (1/4, 3/4)."""
    log2, log3 = math.log(2), math.log(3)
    cases: list[tuple[Any, float]] = [
        (Divergence("reverse_kl"), log2 - 0.5 * log3),  # ½ log 2 + ½ log ⅔
        (Divergence("forward_kl"), -0.25 * log2 + 0.75 * math.log(1.5)),
        (Divergence("top_k", top_k=1), log2 - 0.5 * log3),  # one token and the rest: the same two
        (Divergence("sampled"), -log2 * log2),  # A = log ¼ - log ½ = -log 2
        (Divergence("sampled", low=-0.1), -0.1 * log2),
        (
            Divergence("jsd", beta=0.5),  # m = (3/8, 5/8)
            0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5))
            + 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)),
        ),
    ]
    for divergence, expected in cases:
        assert float(divergence(HALVES, QUARTERS, FIRST)) == pytest.approx(expected, abs=1e-6), divergence


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_against_plain_sums(kind: str, seed: int) -> None:
    """In double precision, to 1e-12; in single, to 1e-5."""
    student, teacher = logps(seed).double().log_softmax(dim=1), logps(seed + 50).double().log_softmax(dim=1)
    tokens = torch.arange(6) + seed
    divergence = Divergence(kind, beta=0.3, top_k=4, low=-1.0, high=0.5)  # type: ignore[arg-type]
    expected = [
        plain(kind, s, t, y, 0.3, 4)
        for s, t, y in zip(student.exp().tolist(), teacher.exp().tolist(), tokens.tolist(), strict=True)
    ]
    assert divergence(student, teacher, tokens).tolist() == pytest.approx(expected, abs=1e-12)
    assert divergence(student.float(), teacher.float(), tokens).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "top_k"])
def test_equal_distributions_are_no_distance_apart(kind: str) -> None:
    student = logps(1).requires_grad_(True)
    loss = Divergence(kind, top_k=3)(student.log_softmax(dim=1), student.detach(), FIRST.expand(6))  # type: ignore[arg-type]
    assert float(loss.detach().abs().max()) < 1e-6
    loss.sum().backward()
    assert float(student.grad.abs().max()) < 1e-5  # type: ignore[union-attr]


def test_top_k_is_a_lower_bound_that_closes() -> None:
    student, teacher = logps(3), logps(4)
    whole = Divergence("reverse_kl")(student, teacher, FIRST.expand(6))
    found = [Divergence("top_k", top_k=k)(student, teacher, FIRST.expand(6)) for k in (1, 3, 6, 11, 99)]
    for fewer, more in itertools.pairwise(found):
        assert (fewer <= more + 1e-6).all()
    torch.testing.assert_close(found[-2], whole)
    torch.testing.assert_close(found[-1], whole)
    values, indices = teacher.topk(3)
    torch.testing.assert_close(Divergence("top_k", top_k=3).of_top(student, values, indices), found[1])


def test_sampled_gradient_is_that_of_the_reverse_kl() -> None:
    """Mean over y ~ s of the gradient of -A log s_y, exactly: Σ_y s_y A_y ∇log s_y = -∇ reverse KL."""
    z = torch.randn(1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.double).requires_grad_(True)
    teacher = logps(9, 1, 7).double()
    (exact,) = torch.autograd.grad(Divergence("reverse_kl")(z.log_softmax(dim=1), teacher, FIRST).sum(), z)
    each = Divergence("sampled", low=-99, high=99)(
        z.log_softmax(dim=1).expand(7, -1), teacher.expand(7, -1), torch.arange(7)
    )
    (mean,) = torch.autograd.grad((z.log_softmax(dim=1).exp().detach()[0] * each).sum(), z)
    torch.testing.assert_close(mean, exact, atol=1e-6, rtol=1e-6)


def test_impossible_tokens_of_one_side() -> None:
    """A token that the student rules out costs nothing; one that the teacher rules out costs without end."""
    gone = torch.tensor([[0.0, -float("inf")]])
    assert float(Divergence("reverse_kl")(gone, HALVES, FIRST)) == pytest.approx(math.log(2))
    assert math.isinf(float(Divergence("reverse_kl")(HALVES, gone, FIRST)))
    assert float(Divergence("sampled")(HALVES, gone, torch.tensor([1]))) == pytest.approx(30 * math.log(0.5))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "mse"}, "kind='mse' must be one of reverse_kl"),
        ({"beta": 1.0}, r"beta=1.0 must be in \(0, 1\)"),
        ({"top_k": 0}, "top_k=0"),
        ({"low": 1.0}, "clamped to"),
    ],
)
def test_refusals(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Divergence(**settings)
