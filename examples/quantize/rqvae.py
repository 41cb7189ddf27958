"""RQ-VAE (Lee et al., arXiv 2203.01941; TIGER, arXiv 2305.05065): an autoencoder with a residual quantiser between.

The quantiser is `vector_quantize_pytorch.ResidualVQ`: k-means for its first codebooks, codes that nobody uses replaced
by vectors of the batch, codebooks by moving averages, commitment loss.

Axes: N items, D dimensions, L levels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from vector_quantize_pytorch import ResidualVQ


class RQVAE(nn.Module):
    """Encoder, residual quantiser and decoder.

    Args:
        dimensions: D.
        sizes: codes of each level; all levels the same.
        latent: width of what is quantised.
        hidden: width of the layer between.
        commitment: weight of the commitment loss.

    Raises:
        ValueError: when levels have different sizes.
    """

    def __init__(
        self, dimensions: int, sizes: tuple[int, ...], *, latent: int = 32, hidden: int = 128, commitment: float = 0.25
    ) -> None:
        super().__init__()
        if len(set(sizes)) != 1:
            raise ValueError(f"RQ-VAE has levels of one size, and sizes are {sizes}; take rq-kmeans")
        self.encoder = nn.Sequential(nn.Linear(dimensions, hidden), nn.ReLU(), nn.Linear(hidden, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, dimensions))
        self.quantiser = ResidualVQ(
            dim=latent, codebook_size=sizes[0], num_quantizers=len(sizes), kmeans_init=True, kmeans_iters=10,
            threshold_ema_dead_code=1, commitment_weight=commitment,
        )  # fmt: skip

    def forward(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        """Reconstruction loss plus commitment loss."""
        quantised, _, commitment = self.quantiser(self.encoder(vectors_BD))
        return nn.functional.mse_loss(self.decoder(quantised), vectors_BD) + commitment.sum()

    @torch.no_grad()
    def codes(self, vectors_ND: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Codes [N, L], and what is decoded [N, D] from the first 1, 2, … levels."""
        _, codes_NL, _ = self.quantiser(self.encoder(vectors_ND), freeze_codebook=True)
        depth = codes_NL.shape[1]
        shorter = [
            torch.where(torch.arange(depth) < levels, codes_NL, -1) for levels in range(1, depth + 1)
        ]  # -1 leaves a level out
        return codes_NL, [self.decoder(self.quantiser.get_output_from_indices(part)) for part in shorter]


def train_rqvae(
    vectors_ND: np.ndarray,
    sizes: tuple[int, ...],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    commitment: float,
    seed: int,
    report: Callable[[int, int, dict[str, float]], None] = lambda step, steps, logs: None,
) -> tuple[np.ndarray, list[np.ndarray], RQVAE]:
    """Codes [N, L], reconstructions [N, D] from the first 1 … L levels, and the model.

    Vectors are standardised by one mean and one scale before, which reconstructions undo.

    Raises:
        ValueError: when a level has more codes than there are items.
    """
    if sizes[0] > len(vectors_ND):
        raise ValueError(f"a level has {sizes[0]} codes for {len(vectors_ND)} items: take fewer codes")
    torch.manual_seed(seed)
    mean_D, scale = vectors_ND.mean(axis=0), float(vectors_ND.std()) or 1.0
    scaled_ND = torch.from_numpy(((vectors_ND - mean_D) / scale).astype(np.float32))
    model = RQVAE(vectors_ND.shape[1], sizes, commitment=commitment)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    # The first batch starts the codebooks by k-means: it must hold more vectors than a codebook has codes.
    size = min(len(scaled_ND), max(batch_size, sizes[0]))
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(scaled_ND))
        losses = []
        for rows in order.split(size):
            loss = model(scaled_ND[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        report(epoch + 1, epochs, {"loss": float(np.mean(losses))})
    model.eval()
    codes_NL, decoded = model.codes(scaled_ND)
    return codes_NL.numpy(), [part.numpy() * scale + mean_D for part in decoded], model
