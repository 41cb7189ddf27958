"""OpenOneRec's Parquet files: maps `pid → sid` and chat rows whose last answer holds the target Sids."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rollout.catalog import Catalog
from rollout.data.codes import MAX_CODEBOOK, infer_size, list_lengths, rows_of_length, sid_problems, usual_length
from rollout.data.files import cast_column, parquet_columns, read_parquet, split_files, table_rows
from rollout.data.problems import BadRow, DataError, Problem, short
from rollout.data.rows import (
    Loaded,
    Splits,
    chat_messages,
    collect,
    items_of_sid,
    items_of_sids,
    require_items,
    usable_items,
    with_popularity,
)
from rollout.sid import Sid, onerec_format
from rollout.types import Record

EXPECTS = "a Parquet map (columns pid, sid) and train*.parquet, valid*.parquet, test*.parquet (or train/, …)"
_CODES = 8192
_USER_KEYS = ("uid", "user_id")


def map_files(root: Path) -> list[Path]:
    """The Parquet files of a folder that map `pid` to `sid`."""
    return [path for path in sorted(root.glob("*.parquet")) if {"pid", "sid"} <= set(parquet_columns(path))]


def load(root: Path) -> Loaded:
    """Read a folder."""
    problems: list[Problem] = []
    catalog = _catalog(root, problems)
    make = partial(_record, catalog)
    splits: Splits = {}
    for split, files in split_files(root, ".parquet").items():
        splits[split] = tuple(record for file in files for record in _records(root, file, make, problems))
    return Loaded(with_popularity(catalog, splits), splits, tuple(problems))


def _catalog(root: Path, problems: list[Problem]) -> Catalog:
    maps = map_files(root)
    if not maps:
        raise DataError(f"{root}: no Parquet file with the columns pid and sid; expected {EXPECTS}")
    tables = [read_parquet(path, ["pid", "sid"]) for path in maps]
    columns = [
        (cast_column(path, table, "pid", pa.string()), cast_column(path, table, "sid", pa.list_(pa.int64())))
        for path, table in zip(maps, tables, strict=True)
    ]
    depth = usual_length(np.concatenate([list_lengths(sids) for _, sids in columns]))
    if not depth:
        raise DataError(f"{maps[0]}: holds no sid")
    item_ids: list[str] = []
    codes: list[np.ndarray] = []
    for path, (pids, sids) in zip(maps, columns, strict=True):
        codes_NL, fits_N = rows_of_length(sids, depth)
        bad = sid_problems(sids, codes_NL, fits_N, (MAX_CODEBOOK,) * depth)
        rows = usable_items(path.name, pids.to_pylist(), bad, problems)
        # Videos and products number their items independently, so with several maps the map is part of the name.
        prefix = f"{path.stem}/" if len(maps) > 1 else ""
        item_ids += [prefix + pid for pid in rows]
        codes.append(codes_NL[list(rows.values())])
    require_items(root, len(item_ids), problems)
    codes_NL = np.concatenate(codes)
    sizes = tuple(infer_size(largest, floor=_CODES) for largest in codes_NL.max(axis=0))
    return Catalog.build(onerec_format(sizes), item_ids, codes_NL)


def _records(
    root: Path, path: Path, make: Callable[[str, dict[str, Any]], Record], problems: list[Problem]
) -> list[Record]:
    table = read_parquet(path, ["source", "messages"], ["metadata"])
    return collect(str(path.relative_to(root)), table_rows(table), make, problems)


def _record(catalog: Catalog, source: str, row: dict[str, Any]) -> Record:
    *prompt, answer = chat_messages(row["messages"])
    if answer["role"] != "assistant":
        detail = f"the last message must be the assistant's, its role is {short(answer['role'])}"
        raise BadRow("missing-field", detail)
    if not prompt:
        raise BadRow("missing-field", "no message stands before the assistant's")
    targets = items_of_sids(catalog, _find(catalog, _after_thought(answer["content"]), "target"), "target")
    if not targets:
        raise BadRow("empty-target", f"the assistant's message holds no sid: {short(answer['content'])}")
    asked = "\n".join(message["content"] for message in prompt if message["role"] == "user")
    history = tuple(items_of_sid(catalog, sid, "history")[0] for sid in _find(catalog, asked, "history"))
    task = row["source"] if isinstance(row["source"], str) else "next_item"
    return Record(source, _user(row.get("metadata")), history, targets, (1.0,) * len(targets), tuple(prompt), task)


def _find(catalog: Catalog, text: str, role: str) -> list[Sid]:
    try:
        return catalog.format.find(text)
    except ValueError as error:
        raise BadRow("code-out-of-range", f"{role}: {error}") from error


def _after_thought(answer: str) -> str:
    """What follows the thought; nothing when a thought is opened and never closed."""
    return answer.rpartition("</think>")[2] if "</think>" in answer else answer.partition("<think>")[0]


def _user(metadata: Any) -> str:
    """The user that the metadata names, "" where they name none (`uuid` names the row)."""
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except (ValueError, RecursionError) as error:
            raise BadRow("wrong-type", f"metadata are not JSON ({error}): {short(metadata)}") from error
    if not isinstance(metadata, dict):
        return ""
    return next((str(metadata[key]) for key in _USER_KEYS if metadata.get(key) is not None), "")
