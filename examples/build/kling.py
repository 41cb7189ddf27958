"""A company's own log into training sets, as Kling's for OneRec-Think.

Input is one TSV or CSV with a header (`COLUMNS`). `semantic_id` holds three codes; `content_type` becomes the fourth,
so that the model's vocabulary has four levels of 256. What comes out, all in one folder:

- `items.json` (title, description, categories, sid of each item), `sequences.txt` (a user, then its items), and
  `behaviours.json` (what each user did, in time order);
- `alignment/`, `sid_prediction/`, `reasoning/`: three training sets of Parquet, each train, val and test;
- `world/`: the same as a data folder for `rl.train`, leave-one-out;
- `left_out.json`: counts of what was found and of what was left out, and why.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from examples.build.rows import LeftOut, leave_one_out, write_data
from examples.build.shards import chat, write_split
from examples.stages import appearing
from rl.cache import write_json
from rollout.catalog import Catalog
from rollout.data.problems import DataError
from rollout.data.rows import Splits
from rollout.sid import SidFormat, onerec_format
from rollout.types import Record

COLUMNS = (
    "user_id", "kling_photo_id", "kling_photo_type", "event_type", "behavior_type", "behavior_subtype", "time_stamp",
    "content_type", "prompt", "title", "introduction", "element_query_content", "query_cnt", "semantic_id",
)  # fmt: skip
REQUIRED = ("user_id", "kling_photo_id", "behavior_type", "time_stamp", "semantic_id")
KEPT = ("RECOMMEND", "SEARCH", "PRODUCE")
"""Behaviours that are learned from."""

LEVELS, CODES = 4, 256
FORMAT: SidFormat = onerec_format((CODES,) * LEVELS)
SYSTEM = "You recommend works to the users of a creative community. A work is written as its semantic id."


@dataclass
class Work:
    """One item of the log."""

    sid: tuple[int, ...]
    title: str = ""
    description: str = ""
    categories: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The Sid as it is written."""
        return FORMAT.format(self.sid)


@dataclass(frozen=True)
class Event:
    """One line of the log that is kept."""

    user: str
    item: str
    behaviour: str
    time: float
    query: str


@dataclass
class Log:
    """What was read."""

    works: dict[str, Work]
    events: dict[str, list[Event]]
    left: LeftOut
    lines: int = 0


def read_log(file: Path) -> Log:
    """Read a log; every line that is not taken over is counted.

    Raises:
        DataError: when the file cannot be read, lacks columns, or no line is left.
    """
    log = Log({}, {}, LeftOut())
    for number, row in _lines(file):
        log.lines += 1
        _take(log, file.name, number, row)
    if not log.events:
        raise DataError(f"{file}: none of {log.lines:,} lines can be used: {dict(log.left.counts)}")
    for events in log.events.values():
        events.sort(key=lambda event: event.time)
    return log


def _lines(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            head = lines.readline()
            delimiter = "\t" if "\t" in head else ","
            lines.seek(0)
            reader = csv.DictReader(lines, delimiter=delimiter)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{file}: lacks the columns {missing}; it has {list(reader.fieldnames or ())}")
            for row in reader:
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as a table in UTF-8: {error}") from error


def _take(log: Log, name: str, number: int, row: Mapping[str, str | None]) -> None:
    lacking = [column for column in REQUIRED if not (row.get(column) or "").strip()]
    if lacking:
        why = "missing-semantic-id" if lacking == ["semantic_id"] else "missing-field"
        log.left.add(name, number, why, f"{', '.join(lacking)} is empty")
        return
    given = {column: (row.get(column) or "").strip() for column in COLUMNS}
    codes = parse_codes(given["semantic_id"])
    if codes is None or len(codes) != LEVELS - 1 or not all(0 <= code < CODES for code in codes):
        shown = f"{given['semantic_id']!r} is no array of {LEVELS - 1} codes from 0 to {CODES - 1}"
        log.left.add(name, number, "bad-semantic-id", shown)
        return
    kind = given["content_type"] or "0"
    if not kind.isdecimal() or int(kind) >= CODES:
        log.left.add(name, number, "bad-content-type", f"{kind!r} is no code from 0 to {CODES - 1}")
        return
    if given["behavior_type"].upper() not in KEPT:
        log.left.add(name, number, "other-behaviour", f"{given['behavior_type']} is none of {', '.join(KEPT)}")
        return
    try:
        time = float(given["time_stamp"])
    except ValueError:
        log.left.add(name, number, "bad-time", f"{given['time_stamp']!r} is no number")
        return
    item, sid = given["kling_photo_id"], (*codes, int(kind))
    work = log.works.setdefault(item, Work(sid))
    if work.sid != sid:
        log.left.add(name, number, "sid-mismatch", f"item {item} is {sid} here and {work.sid} before")
        return
    work.title = work.title or given["title"] or given["introduction"]
    work.description = work.description or given["prompt"]
    category = " > ".join(part for part in (given["content_type"], given["kling_photo_type"]) if part)
    if category and category not in work.categories:
        work.categories.append(category)
    event = Event(given["user_id"], item, given["behavior_type"].upper(), time, given["element_query_content"])
    log.events.setdefault(event.user, []).append(event)


def parse_codes(text: str) -> tuple[int, ...] | None:
    """The codes of an array such as `[1, 2, 3]` or `1,2,3`; None when it is none."""
    match = re.fullmatch(r"\[?\s*(\d+(?:\s*[,\s]\s*\d+)*)\s*\]?", text.strip())
    return tuple(int(code) for code in re.findall(r"\d+", match.group(1))) if match else None


def build_kling(file: Path, out: Path, *, seed: int = 0) -> tuple[dict[str, int], LeftOut]:
    """Everything of the module's docstring; returns counts, and what was left out.

    Raises:
        DataError: when the log cannot be read, or `out` is there already.
    """
    log = read_log(file)
    sequences = {user: [event.item for event in events] for user, events in log.events.items()}
    splits = leave_one_out(sequences, log.left, every_prefix=True)
    found = {"lines": log.lines, "items": len(log.works), "users": len(sequences)}
    found |= {f"{name} samples": len(rows) for name, rows in splits.items()}

    def write(folder: Path) -> None:
        items = {
            item: {
                "title": work.title,
                "description": work.description,
                "categories": work.categories,
                "sid": work.text,
            }
            for item, work in log.works.items()
        }
        write_json(folder / "items.json", items)
        lines = (" ".join([user, *some]) + "\n" for user, some in sequences.items())
        (folder / "sequences.txt").write_text("".join(lines), encoding="utf-8")
        details = {
            user: [{"item": e.item, "behaviour": e.behaviour, "time": e.time, "query": e.query} for e in events]
            for user, events in log.events.items()
        }
        write_json(folder / "behaviours.json", details)
        for name, rows in _alignment(log, seed).items():
            write_split(folder / "alignment", name, rows)
        for split, name in (("train", "train"), ("valid", "val"), ("test", "test")):
            some = splits[split]
            predictions = [_prediction(log, row.user, row.history, row.targets[0]) for row in some]
            write_split(folder / "sid_prediction", name, predictions)
            reasons = [_reasoning(log, row.user, row.history, row.targets[0]) for row in some]
            write_split(folder / "reasoning", name, reasons)
        write_data(*_catalog_and_rows(log, splits), folder / "world")
        log.left.write(folder, found)

    appearing(out, write)
    return found, log.left


def _alignment(log: Log, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Items with title and categories in running text: 90 % to train, the others halved."""
    rows = []
    for item, work in log.works.items():
        about = [f"titled {work.title}"] if work.title else []
        about += [f"in the categories {', '.join(work.categories)}"] if work.categories else []
        about += [f"made from the words: {work.description}"] if work.description else []
        text = f"The work {work.text} is {'; '.join(about)}." if about else f"{work.text} is a work of the community."
        rows.append({"source": "alignment", "text": text, "metadata": {"item": item}})
    order = np.random.default_rng(seed).permutation(len(rows))
    ends = round(0.9 * len(rows)), round(0.95 * len(rows))
    parts = np.split(order, ends)
    return {name: [rows[row] for row in part] for name, part in zip(("train", "val", "test"), parts, strict=True)}


def _prediction(log: Log, user: str, history: Sequence[str], target: str) -> dict[str, Any]:
    """A chat with an empty thought; the answer is the next Sid."""
    seen = "".join(log.works[item].text for item in history)
    asked = f"A user has chosen these works, the oldest first: {seen}\nWhich one is next?"
    return chat("sid_prediction", SYSTEM, asked, log.works[target].text, think=True, user=user)


def _reasoning(log: Log, user: str, history: Sequence[str], target: str) -> dict[str, Any]:
    """A chat whose thought names what the history and the next work have in common, by what the log knows of them."""
    work, past = log.works[target], [log.works[item] for item in history]
    shared = [category for category in work.categories if any(category in one.categories for one in past)]
    asked = "A user has chosen these works, the oldest first:\n" + "\n".join(
        f"{one.text} {one.title}".rstrip() for one in past
    )
    if shared:
        count = sum(shared[0] in one.categories for one in past)
        thought = f"{count} of {len(past)} works are in {shared[0]}, so the next one may be too."
    else:
        thought = "The next work is in none of the categories seen so far: the user tries something new."
    if work.title:
        thought += f" It may be like {work.title}."
    answer = f"<think>\n{thought}\n</think>\n\n{work.text}"
    return chat("reasoning", SYSTEM, f"{asked}\nWhich one is next?", answer, think=False, user=user)


def _catalog_and_rows(log: Log, splits: Mapping[str, Sequence[Any]]) -> tuple[Catalog, Splits]:
    names = list(log.works)
    index = {item: row for row, item in enumerate(names)}
    works = list(log.works.values())
    catalog = Catalog.build(
        FORMAT, names, np.array([work.sid for work in works]), titles=[work.title for work in works],
        categories=[work.categories[0] if work.categories else "" for work in works],
    )  # fmt: skip
    made = {
        name: tuple(
            Record(f"{name}:{number}", row.user, tuple(index[i] for i in row.history), (index[row.targets[0]],), (1.0,))
            for number, row in enumerate(rows)
        )
        for name, rows in splits.items()
    }
    return catalog, made


def check_kling(folder: Path) -> Iterator[tuple[str, str]]:
    """The checklist before training: name of each check, and what is wrong ("" for nothing)."""
    for name in ("items.json", "sequences.txt", "behaviours.json", "left_out.json"):
        yield f"{name} can be read", "" if (folder / name).is_file() else "no such file"
    try:
        items: dict[str, Any] = json.loads((folder / "items.json").read_text(encoding="utf-8"))
        told = json.loads((folder / "left_out.json").read_text(encoding="utf-8"))
        users = (folder / "sequences.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        yield "files are whole", str(error)
        return
    wrong, fields = [], []
    for item, work in items.items():
        try:
            FORMAT.parse(work["sid"])
        except (ValueError, KeyError, TypeError) as error:
            wrong.append(f"{item}: {error}")
        if not {"title", "description", "categories", "sid"} <= set(work if isinstance(work, dict) else ()):
            fields.append(item)
    yield f"every Sid has {LEVELS} levels of codes from 0 to {CODES - 1}", _some(wrong)
    yield "every item has its fields", _some(fields)
    unknown = [f"{line.split()[0]}: {item}" for line in users for item in line.split()[1:] if item not in items]
    yield "every item of a sequence is known", _some(unknown)
    for name in ("alignment", "sid_prediction", "reasoning"):
        lacking = [part for part in ("train", "val", "test") if not list((folder / name).glob(f"{part}*.parquet"))]
        yield f"{name} has train, val and test", f"no {', '.join(lacking)}" if lacking else ""
    found = told.get("found", {})
    yield f"counts: {found}", "" if all(found.get(key) for key in ("items", "users", "train samples")) else "one is 0"
    left = told.get("left_out", {})
    yield f"left out, and counted: {left or 'nothing'}", ""


def _some(wrong: Sequence[str]) -> str:
    return f"{len(wrong)} have not, such as {wrong[0]}" if wrong else ""
