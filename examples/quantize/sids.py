"""Semantic ids from embeddings, as one step: quantise, settle collisions, judge; and the file that keeps them.

Axes: N items, D dimensions, L levels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from examples.quantize.features import Features
from rl.cache import write_json
from rollout.data.problems import DataError

FILE = "semantic_id_dict.json"


@dataclass(frozen=True)
class QuantizeSettings:
    """How Sids are made.

    Args:
        method: rq-kmeans (faiss; seconds) or rq-vae.
        levels: codes of a Sid.
        codes: codes of a level.
        normalise: scale each vector to length 1 first.
        balanced: of rq-kmeans: no cluster of a level gets more than its share of items.
        collisions: items of one Sid stay a cluster (keep), or get one more code that tells them apart (extra).
        seed: of everything that is drawn.
        epochs: of rq-vae: passes over the items.
        batch_size: of rq-vae: items per step.
        learning_rate: of rq-vae.
        commitment: of rq-vae: weight of the commitment loss.
    """

    method: Literal["rq-kmeans", "rq-vae"] = "rq-kmeans"
    levels: int = 4
    codes: int = 256
    normalise: bool = False
    balanced: bool = False
    collisions: Literal["keep", "extra"] = "keep"
    seed: int = 0
    epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 1e-3
    commitment: float = 0.25

    def __post_init__(self) -> None:
        low = [name for name in ("levels", "codes", "epochs", "batch_size") if getattr(self, name) < 1]
        if low:
            raise ValueError(f"{low[0]}={getattr(self, low[0])} must be at least 1")
        if self.balanced and self.method != "rq-kmeans":
            raise ValueError(f"balanced=true is for method=rq-kmeans, and it is {self.method}")


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """Sids of a catalogue.

    Attributes:
        item_ids: names of the items.
        codes_NL: their codes.
        sizes: codes of each level.
        made: how, for people and for the file.
    """

    item_ids: tuple[str, ...]
    codes_NL: np.ndarray
    sizes: tuple[int, ...]
    made: dict[str, Any]

    @property
    def clusters(self) -> np.ndarray:
        """Items of each distinct Sid, largest first."""
        counts = np.unique(self.codes_NL, axis=0, return_counts=True)[1]
        return np.sort(counts)[::-1]

    def save(self, folder: Path) -> None:
        """Write `semantic_id_dict.json` (item id to codes) and `sids.json` (sizes, settings), whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "sids.json", {"sizes": list(self.sizes), "items": len(self.item_ids), **self.made})
        write_json(folder / FILE, dict(zip(self.item_ids, self.codes_NL.tolist(), strict=True)))

    @classmethod
    def load(cls, folder: Path) -> SemanticIds:
        """Read what `save` wrote.

        Raises:
            DataError: when a file is missing or damaged, naming the item.
        """
        try:
            made, codes = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("sids.json", FILE))
            sizes = tuple(int(size) for size in made["sizes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: no Sids that can be read ({error!r}); make them anew with force") from error
        for item, code in codes.items():
            if not isinstance(code, list) or len(code) != len(sizes):
                raise DataError(f"{folder / FILE}: item {item!r} has {code!r}, and a Sid here has {len(sizes)} codes")
            if any(not isinstance(c, int) or not 0 <= c < size for c, size in zip(code, sizes, strict=True)):
                raise DataError(f"{folder / FILE}: item {item!r} has {code!r}, and the levels have {sizes} codes")
        return cls(tuple(codes), np.array(list(codes.values()), dtype=np.int64).reshape(len(codes), -1), sizes, made)


@dataclass(frozen=True, eq=False)
class Quantised:
    """Sids and what is left of the embeddings in them.

    Attributes:
        sids: the Sids.
        reconstructed: embeddings [N, D] made of the first 1, 2, … levels.
    """

    sids: SemanticIds
    reconstructed: list[np.ndarray]


def quantise(
    features: Features,
    settings: QuantizeSettings,
    report: Callable[[str, int, int, dict[str, float]], None] = lambda phase, step, steps, logs: None,
) -> Quantised:
    """Sids of all items.

    Raises:
        ValueError: when there are fewer items than codes of a level.
    """
    start, vectors_ND = time.perf_counter(), prepared(features, settings)
    sizes = (settings.codes,) * settings.levels
    if settings.method == "rq-kmeans":
        from examples.quantize.kmeans import residual_kmeans

        codes_NL, books = residual_kmeans(
            vectors_ND, sizes, balanced=settings.balanced, seed=settings.seed,
            report=lambda level, levels: report("k-means", level, levels, {}),
        )  # fmt: skip
        parts = np.cumsum([book[code_N] for book, code_N in zip(books, codes_NL.T, strict=True)], axis=0)
        reconstructed = list(parts)
    else:
        from examples.quantize.rqvae import train_rqvae

        codes_NL, reconstructed, _ = train_rqvae(
            vectors_ND, sizes, epochs=settings.epochs, batch_size=settings.batch_size,
            learning_rate=settings.learning_rate, commitment=settings.commitment, seed=settings.seed,
            report=lambda step, steps, logs: report("RQ-VAE", step, steps, logs),
        )  # fmt: skip
    if settings.collisions == "extra":
        codes_NL, sizes = with_extra_code(codes_NL, sizes)
    made = {"settings": asdict(settings), "seconds": round(time.perf_counter() - start, 2)}
    return Quantised(SemanticIds(features.item_ids, codes_NL.astype(np.int64), sizes, made), reconstructed)


def prepared(features: Features, settings: QuantizeSettings) -> np.ndarray:
    """The vectors that are quantised [N, D]."""
    vectors_ND = features.vectors_ND
    if settings.normalise:
        vectors_ND = vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
    return vectors_ND


def with_extra_code(codes_NL: np.ndarray, sizes: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """One more level: an item's number among the items of its Sid, in the order of the catalogue (TIGER)."""
    _, cluster_N = np.unique(codes_NL, axis=0, return_inverse=True)
    order = np.argsort(cluster_N, kind="stable")
    ranks = np.arange(len(order)) - np.searchsorted(cluster_N[order], cluster_N[order])
    number_N = np.empty_like(order)
    number_N[order] = ranks
    return np.concatenate([codes_NL, number_N[:, None]], axis=1), (*sizes, int(number_N.max()) + 1)
