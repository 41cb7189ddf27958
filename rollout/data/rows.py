"""Parts that the loaders share: rows to Records, names to items, chat messages, popularity."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from rollout.catalog import Catalog
from rollout.data.problems import BadRow, DataError, Problem, short
from rollout.sid import Sid
from rollout.types import Message, Record

Row = TypeVar("Row")
Splits = dict[str, tuple[Record, ...]]


@dataclass(frozen=True)
class Loaded:
    """What a loader returns: a World without the name of its format."""

    catalog: Catalog
    splits: Splits
    problems: tuple[Problem, ...]


def collect(
    file: str, rows: Iterable[tuple[int, Row]], make: Callable[[str, Row], Record], problems: list[Problem]
) -> list[Record]:
    """Make a Record of every row; those that cannot be made are added to `problems`."""
    records = []
    for number, row in rows:
        try:
            records.append(make(f"{file}:{number}", row))
        except BadRow as bad:
            problems.append(Problem(file, number, bad.why, bad.detail))
    return records


def item_index(catalog: Catalog, item_id: str, role: str) -> int:
    """Row of an item id. BadRow when the catalogue does not have it."""
    index = catalog.index_of.get(item_id)
    if index is None:
        raise BadRow("unknown-item", f"{role} item {short(item_id)} is not in the catalogue")
    return index


def items_of_sid(catalog: Catalog, sid: Sid, role: str) -> tuple[int, ...]:
    """Every item of a Sid. BadRow when the catalogue does not have it."""
    index = catalog.sid_index_of.get(sid)
    if index is None:
        raise BadRow("unknown-item", f"{role} sid {catalog.format.body(sid)} belongs to no item of the catalogue")
    return catalog.items_of_sid(index)


def items_of_sids(catalog: Catalog, sids: Sequence[Sid], role: str) -> tuple[int, ...]:
    """Every item of several Sids, each item once. A file that names Sids means any of the items that share them."""
    return tuple(dict.fromkeys(item for sid in sids for item in items_of_sid(catalog, sid, role)))


def chat_messages(value: object) -> tuple[Message, ...]:
    """Chat messages from a JSON text or a list; the content of each is text or a list of text parts.

    Raises:
        BadRow: missing-field when there is none, wrong-type when it is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow("wrong-type", f"messages are not JSON ({error}): {short(value)}") from error
    if not value:
        raise BadRow("missing-field", "messages are empty (rows of segments or text alone have no target)")
    if not isinstance(value, list):
        raise BadRow("wrong-type", f"messages must be a list, got {short(value)}")
    return tuple(_message(message) for message in value)


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise BadRow("wrong-type", f"a message needs a role and a content, got {short(value)}")
    return {"role": value["role"], "content": _text(value.get("content"))}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping) and content.get("type") == "text" and isinstance(content.get("text"), str):
        return str(content["text"])
    if isinstance(content, list):
        return "".join(_text(part) for part in content)
    raise BadRow("wrong-type", f"the content of a message must be text, got {short(content)}")


def python_literal(text: str, column: str) -> Any:
    """The value of a Python literal, never evaluated as code. BadRow when the text is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRow("wrong-type", f"{column} is no Python list: {short(text)}") from error


def usable_items(
    file: str, item_ids: Sequence[str | None], bad: Mapping[int, tuple[str, str]], problems: list[Problem]
) -> dict[str, int]:
    """Row of every item id that is neither null, nor `bad` (kind and detail by row), nor a repetition."""
    rows: dict[str, int] = {}
    for row, item_id in enumerate(item_ids):
        if item_id is None:
            problems.append(Problem(file, row, "missing-field", "the item id is null"))
        elif row in bad:
            problems.append(Problem(file, row, bad[row][0], f"item {short(item_id)}: {bad[row][1]}"))
        elif item_id in rows:
            problems.append(
                Problem(file, row, "duplicate-item", f"item {short(item_id)} stands twice; the first is kept")
            )
        else:
            rows[item_id] = row
    return rows


def require_items(where: object, count: int, problems: Sequence[Problem]) -> None:
    """DataError when no item is left to make a catalogue of."""
    if not count:
        first = f"; the first of {len(problems)} problems: {problems[0]}" if problems else ""
        raise DataError(f"{where}: has no usable item{first}")


def with_popularity(catalog: Catalog, splits: Splits) -> Catalog:
    """The catalogue with popularity = number of train rows of which the item is a target."""
    targets = [item for record in splits.get("train", ()) for item in record.targets]
    counts_N = np.bincount(np.array(targets, dtype=np.int64), minlength=len(catalog))
    return replace(catalog, popularity_N=counts_N.astype(np.float64))
