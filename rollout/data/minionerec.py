"""MiniOneRec's files: a catalogue in JSON and CSV rows whose lists are Python reprs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rollout.catalog import Catalog
from rollout.data.files import read_csv, split_files
from rollout.data.minionerec_items import read_catalog
from rollout.data.problems import BadRow, DataError, Problem, short
from rollout.data.rows import (
    Loaded,
    Splits,
    collect,
    item_index,
    items_of_sid,
    python_literal,
    with_popularity,
)
from rollout.sid import Sid
from rollout.types import Record

EXPECTS = "<name>.index.json (here or in index/) and train.csv, valid.csv, test.csv (or train/*.csv, …)"
_ID_COLUMNS = ("history_item_id", "item_id")
_SID_COLUMNS = ("history_item_sid", "item_sid")
_INTEGERS = re.compile(r"\[[0-9]+(?:, [0-9]+)*\]")


def index_files(root: Path) -> list[Path]:
    """The catalogues of a folder."""
    return sorted(root.glob("*.index.json")) or sorted(root.glob("index/*.index.json"))


def load(path: Path) -> Loaded:
    """Read a folder, or the one catalogue whose `*.index.json` is given."""
    found = [path] if path.is_file() else index_files(path)
    if len(found) != 1:
        seen = ", ".join(str(file) for file in found) or "none"
        raise DataError(f"{path}: needs one *.index.json, found {seen}; give the path of the one to read")
    index_path = found[0]
    root = index_path.parent.parent if index_path.parent.name == "index" else index_path.parent

    problems: list[Problem] = []
    catalog = read_catalog(root, index_path, problems)
    texts = [catalog.format.body(catalog.sid(item)) for item in range(len(catalog))]
    splits: Splits = {}
    for split, files in split_files(root, ".csv", prefix=index_path.name.removesuffix(".index.json")).items():
        splits[split] = tuple(record for file in files for record in _records(root, file, catalog, texts, problems))
    return Loaded(with_popularity(catalog, splits), splits, tuple(problems))


def _records(root: Path, path: Path, catalog: Catalog, texts: list[str], problems: list[Problem]) -> list[Record]:
    rows = read_csv(path)
    _, header = next(rows, (0, []))
    by_id, by_sid = (all(name in header for name in columns) for columns in (_ID_COLUMNS, _SID_COLUMNS))
    if "user_id" not in header or not (by_id or by_sid):
        raise DataError(
            f"{path}: needs the columns user_id and {', '.join(_ID_COLUMNS)} (or {', '.join(_SID_COLUMNS)}); "
            f"its first line is {short(header)}"
        )
    return collect(str(path.relative_to(root)), rows, _Reader(catalog, texts, header, by_id, by_sid), problems)


@dataclass(frozen=True)
class _Reader:
    """Makes Records of the rows of one CSV file. Item ids decide where there are any; Sids must then agree."""

    catalog: Catalog
    texts: list[str]
    header: list[str]
    by_id: bool
    by_sid: bool

    def __call__(self, source: str, values: list[str]) -> Record:
        """The Record of one row."""
        if len(values) != len(self.header):
            raise BadRow("missing-field", f"the row has {len(values)} fields, the header has {len(self.header)}")
        row = dict(zip(self.header, values, strict=True))
        history_column, target_column = _ID_COLUMNS if self.by_id else _SID_COLUMNS
        for column in ("user_id", history_column):
            if not row[column]:
                raise BadRow("missing-field", f"{column} is empty")
        if not row[target_column]:
            raise BadRow("empty-target", f"{target_column} is empty")
        history, targets = self._items_of_ids(row) if self.by_id else self._items_of_sids(row)
        return Record(source, row["user_id"], history, targets, (1.0,) * len(targets))

    def _items_of_ids(self, row: dict[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        history = tuple(item_index(self.catalog, item_id, "history") for item_id in _item_ids(row["history_item_id"]))
        target = item_index(self.catalog, row["item_id"], "target")
        if self.by_sid:
            sid, written = row["item_sid"], self.texts[target]
            if sid != written:
                raise BadRow("sid-mismatch", f"item {row['item_id']} is {short(sid)} here and {written} in the index")
            expected = [self.texts[item] for item in history]
            if row["history_item_sid"] != str(expected):
                found = _strings(row["history_item_sid"])
                if found != expected:
                    raise BadRow("sid-mismatch", f"the history is {short(found)} here, {short(expected)} in the index")
        return history, (target,)

    def _items_of_sids(self, row: dict[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        sids = [self._parse(text, "history_item_sid") for text in _strings(row["history_item_sid"])]
        history = tuple(items_of_sid(self.catalog, sid, "history")[0] for sid in sids)
        return history, items_of_sid(self.catalog, self._parse(row["item_sid"], "item_sid"), "target")

    def _parse(self, text: str, column: str) -> Sid:
        try:
            return self.catalog.format.parse(text)
        except ValueError as error:
            why = "code-out-of-range" if "out of range" in str(error) else "bad-sid"
            raise BadRow(why, f"{column}: {error}") from error


def _item_ids(text: str) -> list[str]:
    if _INTEGERS.fullmatch(text):
        return text[1:-1].split(", ")
    values = python_literal(text, "history_item_id")
    if not isinstance(values, list) or not all(type(value) in (int, str) for value in values):
        raise BadRow("wrong-type", f"history_item_id must be a list of item ids, got {short(text)}")
    return [str(value) for value in values]


def _strings(text: str) -> list[str]:
    values = python_literal(text, "history_item_sid")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadRow("wrong-type", f"history_item_sid must be a list of texts, got {short(text)}")
    return values
