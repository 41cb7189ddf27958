"""What every builder writes: items and rows, then with Sids a data folder; and what was left out, counted.

Builders of raw logs know items and users, not Sids. They write a folder of rows: `items.parquet` (item_id, title,
description, category), `train.parquet`, `valid.parquet`, `test.parquet` (user, history, targets, as item ids),
`sequences.txt` (each user's items in time order, train part alone) and `left_out.json`. `with_sids` makes the project's
own format of it once `examples.quantize` has made Sids of the items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from examples.quantize.sids import SemanticIds
from examples.stages import appearing
from rl.cache import write_json
from rollout.catalog import Catalog
from rollout.data.files import read_lines, read_parquet
from rollout.data.native import write_world
from rollout.data.problems import DataError, Problem
from rollout.data.rows import Splits, with_popularity
from rollout.data.world import World
from rollout.sid import SidFormat, letters_format, onerec_format
from rollout.types import Record

SPLITS = ("train", "valid", "test")
_ROWS = pa.schema([("user", pa.string()), ("history", pa.list_(pa.string())), ("targets", pa.list_(pa.string()))])


@dataclass
class LeftOut:
    """What a builder does not take over: a count for each reason, and the first rows of each."""

    counts: Counter[str] = field(default_factory=Counter)
    shown: list[Problem] = field(default_factory=list)

    def add(self, file: str, row: int | str, why: str, detail: str, *, keep: int = 20) -> None:
        """Count a row; the first `keep` of each reason are kept whole."""
        self.counts[why] += 1
        if self.counts[why] <= keep:
            self.shown.append(Problem(file, row, why, detail))

    def write(self, folder: Path, found: Mapping[str, int]) -> None:
        """`left_out.json`: what was found, how many rows were left out for each reason, and the first of them."""
        told = {"found": dict(found), "left_out": dict(self.counts), "rows": [str(problem) for problem in self.shown]}
        write_json(folder / "left_out.json", told)


@dataclass(frozen=True)
class Text:
    """What is known of an item."""

    title: str = ""
    description: str = ""
    category: str = ""


@dataclass(frozen=True)
class Row:
    """One row: what a user had, and what is right to recommend next."""

    user: str
    history: tuple[str, ...]
    targets: tuple[str, ...]


def write_rows(
    out: Path,
    items: Mapping[str, Text],
    splits: Mapping[str, Sequence[Row]],
    sequences: Mapping[str, Sequence[str]],
    left: LeftOut,
) -> dict[str, int]:
    """Write a folder of rows; returns its counts.

    Raises:
        DataError: when there is no train row, or the folder is there already.
    """
    if not splits.get("train"):
        raise DataError(f"no train row is left; left out were {dict(left.counts) or 'none'}")
    found = {"items": len(items), "users": len(sequences)} | {name: len(rows) for name, rows in splits.items()}

    def write(folder: Path) -> None:
        columns = {
            name: [getattr(text, name) for text in items.values()] for name in ("title", "description", "category")
        }
        pq.write_table(pa.table({"item_id": list(items), **columns}), folder / "items.parquet")
        for name, rows in splits.items():
            given = {column: [getattr(row, column) for row in rows] for column in ("user", "history", "targets")}
            pq.write_table(pa.table(given, schema=_ROWS), folder / f"{name}.parquet")
        lines = (" ".join([user, *some]) for user, some in sequences.items() if some)
        (folder / "sequences.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        left.write(folder, found)

    appearing(out, write)
    return found


def leave_one_out(sequences: Mapping[str, Sequence[str]], left: LeftOut, *, every_prefix: bool) -> dict[str, list[Row]]:
    """The usual protocol: a user's last item is for test, the one before for valid, all before are for training.

    Args:
        sequences: each user's items, oldest first.
        left: users with fewer than three items are counted there.
        every_prefix: each item of the training part but the first is a target once; else only its last.
    """
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for user, items in sequences.items():
        if len(items) < 3:
            left.add("users", user, "too-few-items", f"{len(items)} items; 3 are needed")
            continue
        for name, place in (("valid", len(items) - 2), ("test", len(items) - 1)):
            splits[name].append(Row(user, tuple(items[:place]), (items[place],)))
        first = 1 if every_prefix else max(1, len(items) - 3)
        splits["train"] += [Row(user, tuple(items[:at]), (items[at],)) for at in range(first, len(items) - 2)]
    return splits


def sid_format(sizes: tuple[int, ...], style: str) -> SidFormat:
    """How Sids are written: `letters` (MiniOneRec) or `onerec` (OpenOneRec)."""
    return onerec_format(sizes) if style == "onerec" else letters_format(sizes)


def with_sids(rows: Path, sids: SemanticIds, out: Path, style: str = "letters") -> dict[str, int]:
    """A data folder from a folder of rows and the Sids of its items; returns its counts.

    Raises:
        DataError: when items have no Sid, rows name unknown items, or the folder is there already.
    """
    table = read_parquet(rows / "items.parquet", ["item_id"], ["title", "category"])
    columns = table.to_pydict()
    code_of = dict(zip(sids.item_ids, sids.codes_NL, strict=True))
    lacking = [item for item in columns["item_id"] if item not in code_of]
    if lacking:
        raise DataError(f"{rows}: {len(lacking):,} items have no Sid, such as {lacking[:3]}; quantise them too")
    catalog = Catalog.build(
        sid_format(sids.sizes, style),
        columns["item_id"],
        np.stack([code_of[item] for item in columns["item_id"]]),
        titles=columns.get("title"),
        categories=columns.get("category"),
    )
    splits = {}
    for name in SPLITS:
        file = rows / f"{name}.parquet"
        if file.exists():
            splits[name] = tuple(_records(file, catalog))
    write_data(catalog, splits, out)
    return {"items": len(catalog), **{name: len(records) for name, records in splits.items()}}


def write_data(catalog: Catalog, splits: Splits, out: Path) -> None:
    """Write a data folder; an item is as popular as it is often a target of train rows.

    Raises:
        DataError: when it is there already.
    """
    write_world(World(with_popularity(catalog, splits), splits, (), "sidrl"), out)


def _records(file: Path, catalog: Catalog) -> Iterable[Record]:
    for number, row in enumerate(read_parquet(file, ["user", "history", "targets"]).to_pylist()):
        try:
            history, targets = (tuple(catalog.index_of[item] for item in row[name]) for name in ("history", "targets"))
        except KeyError as error:
            raise DataError(f"{file}:{number}: item {error} is not among the items") from None
        yield Record(f"{file.name}:{number}", row["user"], history, targets, (1.0,) * len(targets))


def read_sequences(file: Path, left: LeftOut) -> dict[str, list[str]]:
    """Users' items of a text file: a line is the user and then items in time order, separated by spaces.

    Raises:
        DataError: when the file cannot be read.
    """
    sequences: dict[str, list[str]] = {}
    for number, line in read_lines(file):
        user, *items = line.split()
        if user in sequences:
            left.add(file.name, number, "duplicate-user", f"user {user} has a line already; the first is kept")
        else:
            sequences[user] = items
    return sequences


def counts_of(found: Mapping[str, Any], left: LeftOut) -> str:
    """A line for people."""
    kept = ", ".join(f"{count:,} {name}" for name, count in found.items())
    gone = ", ".join(f"{count:,} {why}" for why, count in left.counts.most_common())
    return f"{kept}; left out: {gone or 'nothing'}"
