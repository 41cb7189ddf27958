"""The project's own format: `format.json`, `items.parquet` and one Parquet file of rows per split."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.catalog import Catalog
from rollout.data.codes import list_lengths, rows_of_length, sid_problems, usual_length
from rollout.data.files import cast_column, read_json, read_parquet, split_files, table_rows
from rollout.data.problems import BadRow, DataError, Problem, short
from rollout.data.rows import (
    Loaded,
    Splits,
    chat_messages,
    collect,
    item_index,
    require_items,
    usable_items,
    with_popularity,
)
from rollout.sid import SidFormat
from rollout.types import Record

if TYPE_CHECKING:
    from rollout.data.world import World

EXPECTS = "format.json, items.parquet and train.parquet, valid.parquet, test.parquet"

_STRINGS = pa.list_(pa.string())
_ITEM_TYPES = {
    "item_id": pa.string(),
    "sid": pa.list_(pa.int64()),
    "title": pa.string(),
    "category": pa.string(),
    "popularity": pa.float64(),
    "embedding": pa.list_(pa.float32()),
}
_ROW_TYPES = {
    "user": pa.string(),
    "history": _STRINGS,
    "targets": _STRINGS,
    "gains": pa.list_(pa.float64()),
    "prompt": pa.string(),
    "messages": pa.string(),
    "task": pa.string(),
    "candidates": _STRINGS,
    "excluded": _STRINGS,
    "source": pa.string(),
}
_ITEM_REQUIRED = ("item_id", "sid")
_ROW_REQUIRED = ("user", "history", "targets")


def is_native(root: Path) -> bool:
    """Whether a folder has this format."""
    return (root / "format.json").exists() and (root / "items.parquet").exists()


def load(root: Path) -> Loaded:
    """Read a folder."""
    data, _ = read_json(root / "format.json")
    try:
        fmt = SidFormat.from_dict(data)
    except (ValueError, TypeError) as error:
        raise DataError(f"{root / 'format.json'}: {error}") from error
    problems: list[Problem] = []
    items = _items(root / "items.parquet", fmt, problems)
    splits: Splits = {}
    for split, files in split_files(root, ".parquet").items():
        splits[split] = tuple(record for file in files for record in _records(root, file, items.catalog, problems))
    catalog = items.catalog if items.has_popularity else with_popularity(items.catalog, splits)
    return Loaded(catalog, splits, tuple(problems))


@dataclass(frozen=True)
class _Items:
    catalog: Catalog
    has_popularity: bool


def _typed(path: Path, types: dict[str, pa.DataType], required: tuple[str, ...]) -> dict[str, pa.Array]:
    """The known columns of a file, each in its documented type."""
    table = read_parquet(path, required, [name for name in types if name not in required])
    return {name: cast_column(path, table, name, types[name]) for name in table.column_names}


def _items(path: Path, fmt: SidFormat, problems: list[Problem]) -> _Items:
    columns = _typed(path, _ITEM_TYPES, _ITEM_REQUIRED)
    codes_NL, fits_N = rows_of_length(columns["sid"], fmt.depth)
    bad = sid_problems(columns["sid"], codes_NL, fits_N, fmt.sizes)
    embeddings_ND = None
    dimensions = usual_length(list_lengths(columns["embedding"])) if "embedding" in columns else 0
    if dimensions:
        embeddings_ND, whole_N = rows_of_length(columns["embedding"], dimensions)
        whole_N &= np.isfinite(embeddings_ND).all(axis=1)
        for row in np.flatnonzero(~whole_N).tolist():
            bad.setdefault(row, ("bad-embedding", f"the embedding is not {dimensions} finite numbers"))
    rows = usable_items(path.name, columns["item_id"].to_pylist(), bad, problems)
    require_items(path, len(rows), problems)
    kept = np.array(list(rows.values()))

    def texts(name: str) -> list[str] | None:
        return columns[name].fill_null("").take(pa.array(kept)).to_pylist() if name in columns else None

    popularity_N = np.asarray(columns["popularity"].fill_null(0.0))[kept] if "popularity" in columns else None
    catalog = Catalog.build(
        fmt,
        list(rows),
        codes_NL[kept],
        titles=texts("title"),
        categories=texts("category"),
        popularity_N=popularity_N,
        embeddings_ND=None if embeddings_ND is None else embeddings_ND[kept],
    )
    return _Items(catalog, popularity_N is not None)


def _records(root: Path, path: Path, catalog: Catalog, problems: list[Problem]) -> list[Record]:
    table = pa.table(_typed(path, _ROW_TYPES, _ROW_REQUIRED))
    return collect(str(path.relative_to(root)), table_rows(table), partial(_record, catalog), problems)


def _record(catalog: Catalog, source: str, row: dict[str, Any]) -> Record:
    if not row["targets"]:
        raise BadRow("empty-target", "targets is empty")
    history, targets = (_indices(catalog, row[name] or [], name) for name in ("history", "targets"))
    if len(set(targets)) != len(targets):
        raise BadRow("duplicate-target", f"a target is named twice in {short(row['targets'])}")
    gains = (1.0,) * len(targets) if row.get("gains") is None else tuple(row["gains"])
    if len(gains) != len(targets) or not all(gain is not None and math.isfinite(gain) and gain > 0 for gain in gains):
        raise BadRow("bad-gains", f"{len(targets)} targets need as many gains, each > 0; got {short(row['gains'])}")
    prompt = row.get("prompt")
    if row.get("messages") is not None:
        if prompt is not None:
            raise BadRow("two-prompts", "the row has both a prompt and messages")
        prompt = chat_messages(row["messages"])
    candidates = None
    if row.get("candidates") is not None:
        candidates = _indices(catalog, row["candidates"], "candidates")
        if not candidates:
            raise BadRow("empty-candidates", "candidates is empty; null stands for the whole catalogue")
    task = "next_item" if row.get("task") is None else row["task"]
    source = source if row.get("source") is None else row["source"]
    excluded = _indices(catalog, row.get("excluded") or [], "excluded")
    return Record(source, row["user"] or "", history, targets, gains, prompt, task, candidates, excluded)


def _indices(catalog: Catalog, item_ids: list[str | None], column: str) -> tuple[int, ...]:
    if None in item_ids:
        raise BadRow("missing-field", f"{column} holds a null")
    return tuple(item_index(catalog, item_id, column) for item_id in item_ids if item_id is not None)


def write_world(world: World, folder: str | Path) -> None:
    """Write a World in this format; `load_world` reads the same catalogue and splits from it.

    The folder appears whole or not at all: everything is written beside it and then renamed.

    Raises:
        DataError: when the folder exists and holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists already; remove it or write elsewhere")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    beside.mkdir()
    try:
        text = json.dumps(world.catalog.format.to_dict(), indent=2, ensure_ascii=False)
        (beside / "format.json").write_text(text + "\n", encoding="utf-8")
        _write(beside / "items.parquet", _ITEM_TYPES, _item_columns(world.catalog))
        for split, records in world.splits.items():
            _write(beside / f"{split}.parquet", _ROW_TYPES, _row_columns(world.catalog, records))
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(path: Path, types: dict[str, pa.DataType], columns: dict[str, list[Any]]) -> None:
    pq.write_table(pa.table({name: pa.array(values, types[name]) for name, values in columns.items()}), path)


def _item_columns(catalog: Catalog) -> dict[str, list[Any]]:
    columns = {
        "item_id": list(catalog.item_ids),
        "sid": list(catalog.codes_NL),
        "title": list(catalog.titles),
        "category": list(catalog.categories),
        "popularity": catalog.popularity_N.tolist(),
    }
    return columns if catalog.embeddings_ND is None else columns | {"embedding": list(catalog.embeddings_ND)}


def _row_columns(catalog: Catalog, records: tuple[Record, ...]) -> dict[str, list[Any]]:
    def names(items: tuple[int, ...]) -> list[str]:
        return [catalog.item_ids[item] for item in items]

    chats = [record.prompt if isinstance(record.prompt, tuple) else None for record in records]
    return {
        "user": [record.user for record in records],
        "history": [names(record.history) for record in records],
        "targets": [names(record.targets) for record in records],
        "gains": [list(record.gains) for record in records],
        "prompt": [record.prompt if isinstance(record.prompt, str) else None for record in records],
        "messages": [None if chat is None else json.dumps(chat, ensure_ascii=False) for chat in chats],
        "task": [record.task for record in records],
        "excluded": [names(record.excluded) if record.excluded else None for record in records],
        "candidates": [None if record.candidates is None else names(record.candidates) for record in records],
        "source": [record.source for record in records],
    }
