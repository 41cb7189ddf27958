"""Where item embeddings come from: files, texts, or the sequences in which people took the items.

Axes: N items, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.linalg import svds

from rollout.data.files import cast_column, read_json, read_lines, read_parquet
from rollout.data.problems import DataError, Problem


@dataclass(frozen=True, eq=False)
class Features:
    """Embeddings of items.

    Attributes:
        item_ids: names of the items, unique.
        vectors_ND: float32.
        problems: rows that were left out.
    """

    item_ids: tuple[str, ...]
    vectors_ND: np.ndarray
    problems: tuple[Problem, ...] = ()


def read_features(files: Sequence[Path]) -> Features:
    """Embeddings from Parquet files with `item_id` and `embedding` (a list of numbers).

    An item that stands in several rows or files, with several feature sets, gets their mean.

    Raises:
        DataError: when a file cannot be read, or feature sets have different widths.
    """
    order: dict[str, int] = {}
    rows: list[int] = []
    vectors: list[np.ndarray] = []
    problems: list[Problem] = []
    width = 0
    for file in files:
        table = read_parquet(file, ["item_id", "embedding"])
        ids = cast_column(file, table, "item_id", pa.string()).to_pylist()
        lists = cast_column(file, table, "embedding", pa.list_(pa.float32()))
        for row, (item, values) in enumerate(zip(ids, lists, strict=True)):
            vector = np.asarray(values.values if values.is_valid else [], dtype=np.float32)
            width = width or len(vector)
            if not item:
                problems.append(Problem(file.name, row, "missing-field", "item_id is empty"))
            elif len(vector) != width:
                detail = f"item {item}: {len(vector)} dimensions where the first vector has {width}"
                problems.append(Problem(file.name, row, "bad-embedding", detail))
            elif not np.isfinite(vector).all():
                problems.append(Problem(file.name, row, "bad-embedding", f"item {item}: not all numbers are finite"))
            else:
                rows.append(order.setdefault(item, len(order)))
                vectors.append(vector)
    if not vectors:
        raise DataError(f"{', '.join(map(str, files))}: no item with an embedding")
    sums_ND = np.zeros((len(order), width), dtype=np.float64)
    np.add.at(sums_ND, rows, np.stack(vectors))
    means_ND = sums_ND / np.bincount(rows, minlength=len(order))[:, None]
    return Features(tuple(order), means_ND.astype(np.float32), tuple(problems))


def read_items(file: Path) -> list[str]:
    """Item ids of a Parquet file with `item_id`, or of a text file with one a line.

    Raises:
        DataError: when the file cannot be read.
    """
    if file.suffix == ".parquet":
        ids: list[str] = cast_column(file, read_parquet(file, ["item_id"]), "item_id", pa.string()).to_pylist()
        return ids
    return [line.strip() for _, line in read_lines(file)]


def embed_texts(file: Path, model: Path, batch: int = 64) -> Features:
    """Embeddings of item texts by a sentence-transformers model in a local folder.

    Args:
        file: Parquet with `item_id` and `title` (and `description`, `category` where there), or a JSON object from
            item id to an object with these, as MiniOneRec's `*.item.json`.
        model: folder of the model.
        batch: texts computed at once.

    Raises:
        DataError: when the file cannot be read, or holds no text.
    """
    if not model.is_dir():
        raise DataError(f"{model}: no such folder; give a sentence-transformers model that is on this machine")
    texts, problems = _texts(file)
    if not texts:
        raise DataError(f"{file}: no item with a text")
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(model), local_files_only=True)
    vectors_ND = encoder.encode(
        list(texts.values()), batch_size=batch, show_progress_bar=True, convert_to_numpy=True, normalize_embeddings=True
    )
    return Features(tuple(texts), vectors_ND.astype(np.float32), tuple(problems))


def embed_sequences(file: Path, *, dimensions: int, leave_out: int, window: int = 5, shift: float = 1.0) -> Features:
    """Collaborative embeddings where there is no text: the shifted positive PMI of items near each other, factorised.

    That is what item2vec (arXiv 1603.04259) approaches by sampling (Levy and Goldberg, NIPS 2014), found exactly and
    the same each time.

    Args:
        file: a line for each user: the user, then items in time order, separated by spaces.
        dimensions: D.
        leave_out: newest items of each user that are not learned from (those to be predicted: 2 for leave-one-out).
        window: items up to so many places apart are near each other.
        shift: what is taken off the PMI, in nats (log of the negative samples of item2vec), unless it leaves nothing.

    Raises:
        DataError: when the file cannot be read, or its sequences tell nothing.
        ValueError: when there are no more items than dimensions.
    """
    lines = [line.split()[1:] for _, line in read_lines(file)]
    sequences = [items[: len(items) - leave_out] for items in lines]
    names = tuple(dict.fromkeys(item for items in lines for item in items))
    index = {name: row for row, name in enumerate(names)}
    pairs = [
        (index[one], index[other])
        for items in sequences
        for place, one in enumerate(items)
        for other in items[max(0, place - window) : place]
        if one != other
    ]
    if not pairs:
        raise DataError(
            f"{file}: no user with two items beside {leave_out} that are left out; a line is a user, then items"
        )
    if dimensions >= len(names):
        raise ValueError(f"dimensions={dimensions} must be below the number of items, {len(names)}")
    rows, columns = np.array([*pairs, *((two, one) for one, two in pairs)]).T
    near_NN = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(names), len(names))).tocsr().tocoo()
    count_N = near_NN.sum(axis=1)
    pmi = np.log(near_NN.data * count_N.sum() / (count_N[near_NN.row] * count_N[near_NN.col]))
    pmi -= shift if bool((pmi > shift).any()) else 0.0
    kept = pmi > 0
    if not kept.any():
        raise DataError(f"{file}: any items stand near any others as often: there is nothing to learn from")
    ppmi_NN = coo_array((pmi[kept], (near_NN.row[kept], near_NN.col[kept])), shape=near_NN.shape).tocsr()
    left_ND, values_D, _ = svds(ppmi_NN, k=dimensions, rng=np.random.default_rng(0))
    vectors_ND = left_ND * np.sqrt(values_D)
    # An item of which nothing is known stands in the middle of all.
    vectors_ND[count_N == 0] = vectors_ND[count_N > 0].mean(axis=0)
    return Features(names, vectors_ND.astype(np.float32))


def _texts(file: Path) -> tuple[dict[str, str], list[Problem]]:
    fields = ("title", "description", "category")
    rows: list[tuple[Any, Any, int | str]]
    if file.suffix == ".parquet":
        table = read_parquet(file, ["item_id", "title"], ["description", "category"])
        rows = [(row["item_id"], row, number) for number, row in enumerate(table.to_pylist())]
    else:
        rows = [(item, row, item) for item, row in read_json(file)[0].items()]
    texts: dict[str, str] = {}
    problems: list[Problem] = []
    for item, row, place in rows:
        parts = [row.get(name) for name in fields] if isinstance(row, dict) else []
        text = ". ".join(" ".join(part) if isinstance(part, list) else str(part) for part in parts if part)
        if not item or not text.strip():
            problems.append(Problem(file.name, place, "missing-field", "no item_id, or neither title nor description"))
        else:
            texts[str(item)] = text
    return texts, problems
