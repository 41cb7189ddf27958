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


def embed_sequences(file: Path, *, dimensions: int, leave_out: int, seed: int, epochs: int = 20) -> Features:
    """Collaborative embeddings where there is no text: item2vec (Barkan and Koenigstein, arXiv 1603.04259) by gensim.

    Items taken by the same people near each other come near each other. Workers are one, so that a seed gives the same
    vectors again.

    Args:
        file: a line for each user: the user, then items in time order, separated by spaces.
        dimensions: D.
        leave_out: newest items of each user that are not learned from (those to be predicted: 2 for leave-one-out).
        seed: of the initial vectors and the negative samples.
        epochs: passes over the sequences.

    Raises:
        DataError: when the file cannot be read, or holds no sequence.
    """
    from gensim.models import Word2Vec

    lines = [line.split()[1:] for _, line in read_lines(file) if line.strip()]
    sequences = [items[: len(items) - leave_out] for items in lines if len(items) > leave_out]
    if not sequences:
        raise DataError(f"{file}: no user with more than {leave_out} items; a line is a user and then items")
    model = Word2Vec(
        sequences, vector_size=dimensions, window=5, min_count=1, sg=1, negative=10, epochs=epochs, seed=seed, workers=1
    )
    names = tuple(dict.fromkeys(item for items in lines for item in items))
    known: dict[str, np.ndarray] = {name: model.wv[name] for name in names if name in model.wv}
    # An item that is never learned from stands in the middle of all: nothing is known of it.
    middle: np.ndarray = np.mean(list(known.values()), axis=0)
    vectors_ND = np.stack([known.get(name, middle) for name in names]).astype(np.float32)
    return Features(names, vectors_ND)


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
