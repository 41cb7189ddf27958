"""Plackett–Luce rankings: their draws and their log-probabilities.

A ranking is drawn item by item, each time with the softmax of the scores of what is left (Plackett 1975, Luce 1959).

Axes: P prompts, M rankings of a prompt, K items of a ranking in their order, U candidates of a prompt.
"""

from __future__ import annotations

import numpy as np
import torch

LEAST_LEFT = -1e-6
"""Log of the largest mass that counts as drawn: float32 log-probabilities do not resolve what is left beyond it."""


def draw_rankings(scores_U: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` rankings [M, U] of all candidates: Gumbel noise added to each score, then sorted (arXiv 1903.06059)."""
    return np.argsort(-(scores_U + rng.gumbel(size=(count, len(scores_U)))), axis=1)


def logp_among_candidates(scores_PMK: torch.Tensor, there_PMK: torch.Tensor) -> torch.Tensor:
    """Log-probability [P, M] of rankings of all candidates: Σ_r s_r - log Σ_{j ≥ r} exp(s_j).

    Args:
        scores_PMK: scores in ranked order.
        there_PMK: False on padding, which stands at the end of shorter rankings.
    """
    scores = scores_PMK.double().masked_fill(~there_PMK, -torch.inf)
    left = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (scores - left).masked_fill(~there_PMK, 0.0).sum(-1)


def logp_in_catalogue(logps_PMK: torch.Tensor, there_PMK: torch.Tensor) -> torch.Tensor:
    """Log-probability [P, M] of the first K draws from the whole catalogue: Σ_r log p_r - log(1 - Σ_{j < r} p_j).

    Exact with the drawn items alone, for the probabilities of a catalogue's items under the trie sum to one.

    Args:
        logps_PMK: log-probabilities of items in drawn order.
        there_PMK: False on padding.
    """
    logps = logps_PMK.double().masked_fill(~there_PMK, -torch.inf)
    gone = logps.logcumsumexp(-1)[..., :-1].clamp(max=LEAST_LEFT)
    # log(1 - exp(x)) from whichever end loses nothing (Mächler 2012)
    left = torch.where(gone > -0.6931, (-torch.expm1(gone)).log(), torch.log1p(-gone.exp()))
    left = torch.cat([torch.zeros_like(logps[..., :1]), left], dim=-1)
    return (logps - left).masked_fill(~there_PMK, 0.0).sum(-1)
