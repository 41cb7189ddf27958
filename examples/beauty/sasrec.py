"""SASRec (Kang and McAuley, arXiv 1808.09781), the baseline that everybody knows, trained on the same rows.

With the loss of a softmax over all items instead of one sampled negative, which is known to be the stronger form
(Klenitskiy and Vasilev, arXiv 2309.07602).

    python -m examples.beauty.sasrec --data WORLD --out sasrec.json

Axes: B users, T positions, D width, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import nn
from torch.nn.functional import cross_entropy

from rl.cache import write_json
from rl.metrics import evaluate_lists
from rl.progress import Progress, console, fail_clearly
from rollout.data import World, load_world
from rollout.types import Record


class SASRec(nn.Module):
    """A causal transformer over items; item 0 is padding, so item i stands at i + 1.

    Args:
        items: N.
        length: T.
        width: D.
        layers: blocks.
        heads: attention heads.
        dropout: of embeddings and blocks.
    """

    def __init__(self, items: int, length: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(items + 1, width, padding_idx=0)
        self.places = nn.Embedding(length, width)
        for layer in (self.items, self.places):
            nn.init.normal_(layer.weight, std=width**-0.5)
        self.dropout, self.scale = nn.Dropout(dropout), width**0.5
        block = nn.TransformerEncoderLayer(width, heads, width, dropout, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, items_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] of right-padded sequences."""
        length = items_BT.shape[1]
        hidden_BTD = self.dropout(self.items(items_BT) * self.scale + self.places.weight[:length])
        mask_TT = nn.Transformer.generate_square_subsequent_mask(length, device=items_BT.device)
        return self.blocks(hidden_BTD, mask=mask_TT, is_causal=True)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Scores [N, items] of hidden states."""
        return hidden_ND @ self.items.weight[1:].T


def train_sasrec(
    world: World, progress: Progress, *, length: int = 50, width: int = 64, layers: int = 2, heads: int = 1,
    dropout: float = 0.5, epochs: int = 200, patience: int = 10, batch: int = 128, learning_rate: float = 1e-3,
    seed: int = 0,
) -> SASRec:  # fmt: skip
    """Train on each user's whole training sequence; stops when NDCG@10 on valid has not risen for `patience` epochs."""
    torch.manual_seed(seed)
    longest: dict[str, tuple[int, ...]] = {}
    for record in world.splits["train"]:
        items = (*record.history, *record.targets)
        if len(items) > len(longest.get(record.user, ())):
            longest[record.user] = items
    sequences = [torch.tensor(items[-length - 1 :]) + 1 for items in longest.values()]
    model = SASRec(len(world.catalog), length, width, layers, heads, dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    best, best_weights, since = -1.0, model.state_dict(), 0
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(sequences)).split(batch):
            some = nn.utils.rnn.pad_sequence([sequences[row] for row in rows.tolist()], batch_first=True)
            seen_BT, next_BT = some[:, :-1], some[:, 1:]
            there_BT = next_BT > 0
            loss = cross_entropy(model.logits(model(seen_BT)[there_BT]), next_BT[there_BT] - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = evaluate_sasrec(model, world, "valid", length)["ndcg@10"]
        progress.update("SASRec", epoch + 1, epochs, {"valid ndcg@10": found, "loss": float(loss.detach())})
        since += 1
        if found > best:
            best, since = found, 0
            best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        if since >= patience:
            break
    model.load_state_dict(best_weights)
    return model


@torch.no_grad()
def evaluate_sasrec(model: SASRec, world: World, split: str, length: int = 50, width: int = 50) -> dict[str, float]:
    """Metrics of the `width` likeliest items of each row, over the whole catalogue."""
    model.eval()
    records = world.splits[split]
    lists = [items for some in _batches(records, 256) for items in _likeliest(model, some, length, width)]
    catalog = world.catalog
    result = evaluate_lists(
        [[int(catalog.sid_index_N[item]) for item in items] for items in lists],
        [record.targets for record in records],
        [record.gains for record in records],
        catalog,
        bootstrap=1,
        seed=0,
    )
    return dict(result.values)


def _batches(records: Sequence[Record], size: int) -> list[Sequence[Record]]:
    return [records[start : start + size] for start in range(0, len(records), size)]


def _likeliest(model: SASRec, records: Sequence[Record], length: int, width: int) -> list[list[int]]:
    rows = [torch.tensor(record.history[-length:] or (-1,)) + 1 for record in records]
    items_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    last_B = torch.tensor([len(row) - 1 for row in rows])
    hidden_BD = model(items_BT)[torch.arange(len(rows)), last_B]
    return model.logits(hidden_BD).topk(min(width, model.items.num_embeddings - 1), dim=1).indices.tolist()


def run(data: Path, out: Path, seed: int = 0, epochs: int = 200) -> None:
    """Train SASRec on a data folder whose items each have a Sid of their own, and write its metrics.

    Args:
        data: the data folder.
        out: JSON file of metrics on test.
        seed: of weights and order.
        epochs: most passes over the users.
    """
    progress, world = Progress(), load_world(data)
    if world.catalog.collisions:
        raise ValueError(f"{data}: {world.catalog.collisions} items share Sids; give each its own (collisions: extra)")
    with progress.shown():
        model = train_sasrec(world, progress, seed=seed, epochs=epochs)
    values = evaluate_sasrec(model, world, "test")
    write_json(out, {key: float(value) for key, value in values.items()})
    shown = ", ".join(f"{key} {values[key]:.4f}" for key in ("hr@5", "ndcg@5", "hr@10", "ndcg@10"))
    console.print(f"{shown}; all in {out}", markup=False)


if __name__ == "__main__":
    with fail_clearly():
        auto_cli(run, as_positional=False)
