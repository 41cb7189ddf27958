"""Finding and opening the files of a data folder; every failure is a DataError that names the file."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.data.problems import DataError

_SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # long histories exceed the default of 128 kB


def split_files(root: Path, suffix: str, prefix: str = "") -> dict[str, list[Path]]:
    """The row files of each split: `train*.csv` in the folder, or `train/*.csv`; the same for valid (val) and test.

    Args:
        root: the data folder.
        suffix: extension such as `.csv`.
        prefix: where a subfolder has files of this beginning, its other files belong to another catalogue.

    Raises:
        DataError: when a split stands in both places, or no split is found at all.
    """
    found = {}
    for split, names in _SPLIT_NAMES.items():
        pattern = re.compile(rf"(?:{'|'.join(names)})(?:[._-].*)?{re.escape(suffix)}")
        flat = [p for p in sorted(root.glob(f"*{suffix}")) if pattern.fullmatch(p.name)]
        nested = [p for name in names for p in sorted((root / name).glob(f"*{suffix}"))]
        nested = [p for p in nested if p.name.startswith(prefix)] or nested
        if flat and nested:
            both = f"{flat[0].name} and {nested[0].parent.name}/"
            raise DataError(f"{root}: the {split} rows stand in both {both}; keep one of them")
        if flat or nested:
            found[split] = flat or nested
    if not found:
        raise DataError(
            f"{root}: no row files; expected train{suffix}, valid{suffix} or test{suffix}, or folders of these names"
        )
    return found


def read_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A JSON object and the keys that it names more than once (the first value of each is kept)."""
    repeated: list[str] = []

    def pairs_to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                repeated.append(key)
            else:
                out[key] = value
        return out

    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=pairs_to_dict)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); is it whole?") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value, repeated


def read_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The header and the rows of a CSV file, each with the line on which it begins. Blank lines are no rows."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            before = 0
            for values in reader:
                if values:
                    yield before + 1, values
                before = reader.line_num
    except csv.Error as error:
        hint = "is the file whole, are its quotes paired?"
        raise DataError(f"{path}: what begins on line {before + 1} is not CSV ({error}); {hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns of a Parquet file."""
    try:
        return list(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); is it whole?") from error


def read_parquet(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """The named columns of a Parquet file; optional ones only where they exist."""
    present = parquet_columns(path)
    missing = [name for name in required if name not in present]
    if missing:
        raise DataError(f"{path}: lacks the columns {missing}; it has {present}")
    columns = [*required, *(name for name in optional if name in present)]
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); is it whole?") from error


def cast_column(path: Path, table: pa.Table, name: str, kind: pa.DataType) -> pa.Array:
    """One column as one array of a type. DataError when its values do not convert without loss."""
    column = table.column(name)
    try:
        chunks = column.cast(kind).combine_chunks()
    except pa.ArrowException as error:
        raise DataError(f"{path}: column {name!r} is {column.type} and not {kind} ({error})") from error
    return pa.concat_arrays(chunks.chunks) if isinstance(chunks, pa.ChunkedArray) else chunks


def table_rows(table: pa.Table) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with their numbers, one batch in memory at a time."""
    number = 0
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            yield number, row
            number += 1
