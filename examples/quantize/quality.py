"""How good semantic ids are: what they keep of the embeddings, how their codes are used, how many items they share.

Axes: N items, D dimensions, L levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples.quantize.sids import Quantised

SAMPLE = 5000
"""Items whose neighbours are looked at."""


def quality(quantised: Quantised, vectors_ND: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Figures of the report, a list with a number for each level where they are of levels.

    - `error`: squared error of the first 1, 2, … levels, as a share of the variance.
    - `used`, `perplexity`: codes of the level that occur, and exp of the entropy of their frequencies.
    - `distinct`, `collisions`, `largest_cluster`: Sids, items beyond the first of their Sid, most items of one Sid.
    - `neighbours`: share of items whose nearest neighbour has the same first 1, 2, … codes, and `chance`: that of a
      random other item.
    """
    sids = quantised.sids
    codes_NL, count = sids.codes_NL, len(sids.item_ids)
    centred = vectors_ND - vectors_ND.mean(axis=0)
    variance = float((centred.astype(np.float64) ** 2).sum()) or 1.0
    shares = [np.bincount(code_N, minlength=size) / count for code_N, size in zip(codes_NL.T, sids.sizes, strict=True)]
    clusters = sids.clusters
    lost = [float(((vectors_ND - part) ** 2).sum(dtype=np.float64)) for part in quantised.reconstructed]
    rng = np.random.default_rng(seed)
    rows = rng.permutation(count)[:SAMPLE]
    index = faiss.IndexFlatL2(vectors_ND.shape[1])
    index.add(np.ascontiguousarray(vectors_ND, dtype=np.float32))
    _, near_S2 = index.search(np.ascontiguousarray(vectors_ND[rows], dtype=np.float32), min(2, count))
    near_S = np.where(near_S2[:, 0] == rows, near_S2[:, -1], near_S2[:, 0])
    other_S = (rows + rng.integers(1, max(count, 2), len(rows))) % count
    return {
        "items": count,
        "error": [part / variance for part in lost],
        "used": [int((share > 0).sum()) for share in shares],
        "perplexity": [float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())) for share in shares],
        "distinct": len(clusters),
        "collisions": int(count - len(clusters)),
        "largest_cluster": int(clusters[0]),
        "clusters": {str(size): int((clusters == size).sum()) for size in np.unique(clusters)},
        "neighbours": _same_prefix(codes_NL[rows], codes_NL[near_S]),
        "chance": _same_prefix(codes_NL[rows], codes_NL[other_S]),
    }


def _same_prefix(one_SL: np.ndarray, other_SL: np.ndarray) -> list[float]:
    same_SL = np.logical_and.accumulate(one_SL == other_SL, axis=1)
    return [float(share) for share in same_SL.mean(axis=0)]


def draw(figures: dict[str, Any], sizes: tuple[int, ...], out: Path) -> None:
    """Four panels: error, use of codes, cluster sizes, neighbours."""
    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    (error, used), (clusters, neighbours) = figure.subplots(2, 2)
    levels = np.arange(1, len(sizes) + 1)
    error.plot(levels[: len(figures["error"])], figures["error"], marker="o", color="#0072B2")
    error.set(title="What is lost", xlabel="levels kept", ylabel="error, share of the variance", ylim=0)
    used.bar(levels - 0.2, figures["used"], 0.4, label="codes that occur", color="#999999")
    used.bar(levels + 0.2, figures["perplexity"], 0.4, label="perplexity", color="#0072B2")
    used.plot(levels, sizes, "k_", markersize=24, label="codes of the level")
    used.set(title="How codes are used", xlabel="level", ylim=(0, 1.4 * max(sizes)))
    used.legend(frameon=False)
    counted = {int(size): count for size, count in figures["clusters"].items()}
    clusters.bar(list(counted), list(counted.values()), color="#0072B2")
    clusters.set(
        title=f"{figures['collisions']:,} of {figures['items']:,} items share a Sid with an earlier one",
        xlabel="items of a Sid", ylabel="Sids", yscale="log",
    )  # fmt: skip
    neighbours.plot(levels, figures["neighbours"], marker="o", color="#0072B2", label="nearest neighbour")
    neighbours.plot(levels, figures["chance"], marker="o", color="#999999", label="any other item")
    neighbours.set(title="Same first codes", xlabel="levels compared", ylabel="share of items", ylim=(-0.02, 1.02))
    neighbours.legend(frameon=False)
    for axes in (error, used, neighbours):
        axes.set_xticks(levels)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
