"""MiniOneRec's files: `*.index.json`, `*.item.json`, `info.txt` and CSV rows whose lists are Python reprs."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rollout.catalog import Catalog
from rollout.data.codes import MAX_CODEBOOK, infer_size
from rollout.data.files import read_csv, read_json, split_files
from rollout.data.problems import BadRow, DataError, Problem, short
from rollout.data.rows import Loaded, Splits, collect, item_index, items_of_sids, require_items, with_popularity
from rollout.sid import Sid, SidFormat
from rollout.types import Record

EXPECTS = "<name>.index.json (here or in index/) and train.csv, valid.csv, test.csv (or train/*.csv, …)"
_ID_COLUMNS = ("history_item_id", "item_id")
_SID_COLUMNS = ("history_item_sid", "item_sid")
_TOKEN = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)
_INTEGERS = re.compile(r"\[[0-9]+(?:, [0-9]+)*\]")


def index_files(root: Path) -> list[Path]:
    """The catalogues of a folder."""
    return sorted(root.glob("*.index.json")) or sorted(root.glob("index/*.index.json"))


def load(path: Path) -> Loaded:
    """Read a folder, or the one catalogue whose `*.index.json` is given."""
    found = [path] if path.is_file() else index_files(path)
    if len(found) != 1:
        seen = "none" if not found else ", ".join(str(file) for file in found)
        raise DataError(f"{path}: needs one *.index.json, found {seen}; give the path of the one to read")
    index_path = found[0]
    root = index_path.parent.parent if index_path.parent.name == "index" else index_path.parent
    name = index_path.name.removesuffix(".index.json")

    problems: list[Problem] = []
    catalog = _catalog(root, index_path, problems)
    splits: Splits = {}
    for split, files in split_files(root, ".csv", prefix=name).items():
        splits[split] = tuple(record for file in files for record in _records(root, file, catalog, problems))
    return Loaded(with_popularity(catalog, splits), splits, tuple(problems))


def _catalog(root: Path, index_path: Path, problems: list[Problem]) -> Catalog:
    file = str(index_path.relative_to(root))
    index, repeated = read_json(index_path)
    problems += [Problem(file, key, "duplicate-item", "the item stands twice; the first one is kept") for key in repeated]
    fmt, sids = _sids(file, index, problems)
    require_items(index_path, len(sids), problems)
    assert fmt is not None

    texts, info = _item_texts(root, index_path, set(index), problems), _info(root, index_path, fmt, index, sids, problems)
    titles = [_title(texts.get(item_id)) or info.get(item_id, "") for item_id in sids]
    categories = [_category(texts.get(item_id, {}).get("categories")) for item_id in sids]
    return Catalog.build(fmt, list(sids), [*sids.values()], titles=titles, categories=categories)  # type: ignore[arg-type]


def _sids(file: str, index: dict[str, Any], problems: list[Problem]) -> tuple[SidFormat | None, dict[str, Sid]]:
    """The format that most items are written in, and the Sid of every item that is written so."""
    parts: dict[str, list[tuple[str, int]]] = {}
    for item_id, tokens in index.items():
        try:
            parts[item_id] = _split_tokens(tokens)
        except BadRow as bad:
            problems.append(Problem(file, item_id, bad.why, bad.detail))
    if not parts:
        return None, {}
    depth = Counter(len(levels) for levels in parts.values()).most_common(1)[0][0]
    whole = {item_id: levels for item_id, levels in parts.items() if len(levels) == depth}
    patterns = tuple(
        Counter(levels[level][0] for levels in whole.values()).most_common(1)[0][0] for level in range(depth)
    )
    sids: dict[str, Sid] = {}
    for item_id, levels in parts.items():
        if item_id not in whole:
            detail = f"{index[item_id]} has {len(levels)} levels, the others have {depth}"
            problems.append(Problem(file, item_id, "wrong-depth", detail))
        elif tuple(pattern for pattern, _ in levels) != patterns:
            problems.append(Problem(file, item_id, "bad-sid", f"{index[item_id]} is not of the form {''.join(patterns)}"))
        else:
            sids[item_id] = tuple(code for _, code in levels)
    if not sids:
        return None, {}
    sizes = tuple(infer_size(max(codes), floor=256) for codes in zip(*sids.values(), strict=True))
    try:
        return SidFormat(patterns, sizes), sids
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error


def _split_tokens(tokens: Any) -> list[tuple[str, int]]:
    """Pattern and code of each token."""
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise BadRow("wrong-type", f"an item needs a list of tokens, got {short(tokens)}")
    levels = []
    for level, token in enumerate(tokens):
        match = _TOKEN.fullmatch(token)
        if not match or match[2] != str(code := int(match[2][:9])):
            raise BadRow("bad-sid", f"token {short(token)} of level {level} does not hold one code as in <a_17>")
        if code >= MAX_CODEBOOK:
            raise BadRow("code-out-of-range", f"code {code} is out of range [0, {MAX_CODEBOOK}) at level {level}")
        levels.append((f"{match[1]}{{}}{match[3]}", code))
    return levels


def _item_texts(root: Path, index_path: Path, known: set[str], problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """The contents of `*.item.json`, where there is one."""
    path = index_path.with_name(index_path.name.replace(".index.json", ".item.json"))
    if not path.exists():
        return {}
    file = str(path.relative_to(root))
    texts, repeated = read_json(path)
    problems += [Problem(file, key, "duplicate-item", "the key stands twice; the first one is kept") for key in repeated]
    good = {}
    for item_id, text in texts.items():
        if item_id not in known:
            problems.append(Problem(file, item_id, "missing-sid", f"the item has no sid in {index_path.name}"))
        elif not isinstance(text, dict):
            problems.append(Problem(file, item_id, "wrong-type", f"an item needs an object, got {short(text)}"))
        else:
            good[item_id] = text
    return good


def _info(
    root: Path, index_path: Path, fmt: SidFormat, index: dict[str, Any], sids: dict[str, Sid], problems: list[Problem]
) -> dict[str, str]:
    """Titles of `info.txt` (or `info/<name>*.txt`), where there is one; its Sids must be those of the index."""
    name = index_path.name.removesuffix(".index.json")
    titles = {}
    for path in sorted(root.glob("info.txt")) or sorted(root.glob(f"info/{name}*.txt")):
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            fields = line.rstrip("\r").split("\t")
            sid, title, item_id = fields[0], "\t".join(fields[1:-1]), fields[-1]
            why, detail = "", ""
            if len(fields) < 3:
                why, detail = "missing-field", f"a line needs sid, title and item id between tabs, got {short(line)}"
            elif item_id not in index:
                why, detail = "unknown-item", f"item {short(item_id)} is not in {index_path.name}"
            elif item_id in sids and sid != fmt.body(sids[item_id]):
                why, detail = "sid-mismatch", f"item {item_id} is {short(sid)} here and {fmt.body(sids[item_id])} in the index"
            if why:
                problems.append(Problem(str(path.relative_to(root)), number, why, detail))
            else:
                titles[item_id] = title
    return titles


def _title(text: dict[str, Any] | None) -> str:
    title = (text or {}).get("title")
    return title if isinstance(title, str) else ""


def _category(value: Any) -> str:
    """The category as it stands; the first one of a list or of a list's repr."""
    if isinstance(value, str) and value.startswith("["):
        value = _literal(value, "categories", lenient=True)
    while isinstance(value, list):
        value = value[0] if value else ""
    return value if isinstance(value, str) else ""


def _literal(text: str, column: str, lenient: bool = False) -> Any:
    """A Python literal. BadRow when it is none (the text itself when `lenient`)."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        if lenient:
            return text
        raise BadRow("wrong-type", f"{column} is not a Python list: {short(text)}") from error


def _records(root: Path, path: Path, catalog: Catalog, problems: list[Problem]) -> list[Record]:
    rows = read_csv(path)
    _, header = next(rows, (0, []))
    by_id, by_sid = (all(name in header for name in columns) for columns in (_ID_COLUMNS, _SID_COLUMNS))
    if "user_id" not in header or not (by_id or by_sid):
        raise DataError(
            f"{path}: needs the columns user_id and {', '.join(_ID_COLUMNS)} (or {', '.join(_SID_COLUMNS)}); "
            f"its first line is {short(header)}"
        )
    texts = [catalog.format.body(catalog.sid(index)) for index in range(len(catalog))]
    make: Callable[[str, list[str]], Record] = partial(_record, catalog, texts, header, by_id, by_sid)
    return collect(str(path.relative_to(root)), rows, make, problems)


def _record(
    catalog: Catalog, texts: list[str], header: list[str], by_id: bool, by_sid: bool, source: str, values: list[str]
) -> Record:
    if len(values) != len(header):
        raise BadRow("missing-field", f"the row has {len(values)} fields, the header has {len(header)}")
    row = dict(zip(header, values, strict=True))
    history_column, target_column = _ID_COLUMNS if by_id else _SID_COLUMNS
    for column in ("user_id", history_column):
        if not row[column]:
            raise BadRow("missing-field", f"{column} is empty")
    if not row[target_column]:
        raise BadRow("empty-target", f"{target_column} is empty")
    if by_id:
        history = [item_index(catalog, item_id, "history") for item_id in _item_ids(row["history_item_id"])]
        targets: tuple[int, ...] = (item_index(catalog, row["item_id"], "target"),)
        if by_sid:
            _check_sids(row, [texts[item] for item in history], texts[targets[0]])
    else:
        sids = [_parse(catalog, text, "history_item_sid") for text in _strings(row["history_item_sid"], "history_item_sid")]
        history = [items_of_sids(catalog, [sid], "history")[0] for sid in sids]
        targets = items_of_sids(catalog, [_parse(catalog, row["item_sid"], "item_sid")], "target")
    return Record(source, row["user_id"], tuple(history), targets, (1.0,) * len(targets))


def _item_ids(text: str) -> list[str]:
    if _INTEGERS.fullmatch(text):
        return text[1:-1].split(", ")
    values = _literal(text, "history_item_id")
    if not isinstance(values, list) or not all(type(value) in (int, str) for value in values):
        raise BadRow("wrong-type", f"history_item_id must be a list of item ids, got {short(text)}")
    return [str(value) for value in values]


def _strings(text: str, column: str) -> list[str]:
    values = _literal(text, column)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadRow("wrong-type", f"{column} must be a list of texts, got {short(text)}")
    return values


def _parse(catalog: Catalog, text: str, column: str) -> Sid:
    try:
        return catalog.format.parse(text)
    except ValueError as error:
        raise BadRow("code-out-of-range" if "out of range" in str(error) else "bad-sid", f"{column}: {error}") from error


def _check_sids(row: dict[str, str], history: list[str], target: str) -> None:
    """The Sids of a row must be those that the index gives to its item ids."""
    if row["item_sid"] != target:
        raise BadRow("sid-mismatch", f"item {row['item_id']} is {short(row['item_sid'])} here and {target} in the index")
    if row["history_item_sid"] != str(history) and (found := _strings(row["history_item_sid"], "history_item_sid")) != history:
        raise BadRow("sid-mismatch", f"the history is {short(found)} here and {short(history)} in the index")
