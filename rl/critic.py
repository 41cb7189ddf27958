"""The critic of PPO: what reward a policy may still expect before each token, and the advantages that follow.

Axes: B rows, T completion tokens, D hidden size. Values are those of the state before a token is written.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from configs.update import CriticConfig
from rl.batch import Batch
from rl.scoring import TokenScores, hidden_states
from rl.tiny import build_model

FILE = "critic.safetensors"


class Critic(nn.Module):
    """A value head, on the policy's hidden states or on those of a small model of its own.

    Args:
        settings: kind and sizes.
        width: the policy's hidden size.
        tokenizer: the policy's, for a model of its own.
    """

    def __init__(self, settings: CriticConfig, width: int, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.settings = settings
        self.trunk = None
        if settings.kind == "model":
            self.trunk = build_model(
                tokenizer, hidden_size=settings.hidden_size, layers=settings.layers, heads=settings.heads
            )
            width = settings.hidden_size
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        for parameter in self.head[-1].parameters():  # it starts by expecting nothing
            nn.init.zeros_(parameter)

    def values(self, batch: Batch, scores: TokenScores, group: int | None) -> torch.Tensor:
        """Values [B, T] of a batch of rollouts, float32.

        Args:
            batch: prompts and completions.
            scores: the policy's, whose hidden states a head without a model of its own reads; their gradient is cut
                off if `critic.detach`.
            group: rows of a group, to compute its prompt once; None computes each row by itself.
        """
        if self.trunk is not None:
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            hidden_BTD = hidden_states(self.trunk, ids, mask, batch["completion_ids"].shape[1], group=group)
        else:
            hidden_BTD = scores.hidden_BTD.detach() if self.settings.detach else scores.hidden_BTD
        return self.head(hidden_BTD.float())[..., 0] * batch["completion_mask"]

    def save(self, folder: Path) -> None:
        """Write the weights into a checkpoint."""
        save_model(self, str(folder / FILE))

    def load(self, folder: Path) -> None:
        """Read them back. Raises ValueError when the checkpoint has none or those of another critic."""
        try:
            load_model(self, str(folder / FILE))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder / FILE}: no critic of these settings ({error})") from error


def gae(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor, mask_BT: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), and the returns that values are fitted to.

    δ_t = r_t + γ V_{t+1} - V_t with V = 0 after the last token; A_t = δ_t + γ λ A_{t+1}; return_t = A_t + V_t.

    Returns:
        advantages and returns [B, T], zero where the mask is.
    """
    advantages_BT = torch.zeros_like(values_BT)
    after_B = next_value_B = torch.zeros_like(values_BT[:, 0])
    for step in reversed(range(values_BT.shape[1])):
        there_B = mask_BT[:, step].bool()
        delta_B = rewards_BT[:, step] + gamma * next_value_B - values_BT[:, step]
        after_B = torch.where(there_B, delta_B + gamma * lam * after_B, 0.0)
        next_value_B = torch.where(there_B, values_BT[:, step], 0.0)
        advantages_BT[:, step] = after_B
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def whitened(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1 over the tokens of the batch."""
    chosen = values_BT[mask_BT.bool()]
    return (values_BT - chosen.mean()) / (chosen.std() + 1e-8) * mask_BT


def value_loss(
    values_BT: torch.Tensor,
    before_BT: torch.Tensor,
    returns_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    clip: float,
) -> torch.Tensor:
    """Half the mean over tokens of max((V - R)², (clip(V, V_before ± clip) - R)²), as in PPO's reference code."""
    clipped_BT = before_BT + (values_BT - before_BT).clamp(-clip, clip)
    worse_BT = torch.maximum((values_BT - returns_BT) ** 2, (clipped_BT - returns_BT) ** 2)
    return 0.5 * (worse_BT * mask_BT).sum() / mask_BT.sum()


def explained_variance(values_BT: torch.Tensor, returns_BT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one; 0 where all returns are equal."""
    values, returns = values_BT[mask_BT.bool()], returns_BT[mask_BT.bool()]
    variance = float(returns.var())
    return 1 - float((returns - values).var()) / variance if variance > 1e-12 else 0.0
