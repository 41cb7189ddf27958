"""MiniOneRec's catalogue: `*.index.json`, and where they exist `*.item.json` and `info.txt`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from rollout.catalog import Catalog
from rollout.data.codes import MAX_CODEBOOK, infer_size
from rollout.data.files import read_json, read_lines
from rollout.data.problems import BadRow, DataError, Problem, short
from rollout.data.rows import python_literal, require_items
from rollout.sid import Sid, SidFormat

_TOKEN = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)


def read_catalog(root: Path, index_path: Path, problems: list[Problem]) -> Catalog:
    """The items of one index. The format is read off its tokens; each size is a power of two, at least 256."""
    index = _read_object(root, index_path, problems)
    fmt, sids = _sids(str(index_path.relative_to(root)), index, problems)
    texts = _item_texts(root, index_path, index, problems)
    written = {item_id: fmt.body(sids[item_id]) if item_id in sids else None for item_id in index}
    titles = _info_titles(root, index_path.name.removesuffix(".index.json"), written, problems)
    for item_id, text in texts.items():
        if isinstance(text.get("title"), str) and text["title"]:
            titles[item_id] = text["title"]
    return Catalog.build(
        fmt,
        list(sids),
        np.array(list(sids.values())),
        titles=[titles.get(item_id, "") for item_id in sids],
        categories=[_category(texts.get(item_id, {}).get("categories")) for item_id in sids],
    )


def _read_object(root: Path, path: Path, problems: list[Problem]) -> dict[str, Any]:
    value, repeated = read_json(path)
    file = str(path.relative_to(root))
    problems += [Problem(file, key, "duplicate-item", "the key stands twice; the first is kept") for key in repeated]
    return value


def _sids(file: str, index: dict[str, Any], problems: list[Problem]) -> tuple[SidFormat, dict[str, Sid]]:
    """The format that most items are written in, and the Sid of every item that is written so."""
    parts: dict[str, list[tuple[str, int]]] = {}
    for item_id, tokens in index.items():
        try:
            parts[item_id] = _split_tokens(tokens)
        except BadRow as bad:
            problems.append(Problem(file, item_id, bad.why, bad.detail))
    require_items(file, len(parts), problems)
    depth = _commonest([len(levels) for levels in parts.values()])
    whole = [levels for levels in parts.values() if len(levels) == depth]
    patterns = tuple(_commonest([levels[level][0] for levels in whole]) for level in range(depth))
    sids: dict[str, Sid] = {}
    for item_id, levels in parts.items():
        if len(levels) != depth:
            detail = f"{short(index[item_id])} has {len(levels)} levels, the catalogue has {depth}"
            problems.append(Problem(file, item_id, "wrong-depth", detail))
        elif tuple(pattern for pattern, _ in levels) != patterns:
            detail = f"{short(index[item_id])} is not of the form {''.join(patterns)}"
            problems.append(Problem(file, item_id, "bad-sid", detail))
        else:
            sids[item_id] = tuple(code for _, code in levels)
    require_items(file, len(sids), problems)
    sizes = tuple(infer_size(max(codes), floor=256) for codes in zip(*sids.values(), strict=True))
    try:
        return SidFormat(patterns, sizes), sids
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error


def _commonest(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _split_tokens(tokens: Any) -> list[tuple[str, int]]:
    """Pattern and code of each token."""
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise BadRow("wrong-type", f"an item needs a list of tokens, got {short(tokens)}")
    levels = []
    for level, token in enumerate(tokens):
        match = _TOKEN.fullmatch(token)
        digits = match[2] if match else ""
        if not match or digits != (digits.lstrip("0") or "0"):
            raise BadRow("bad-sid", f"token {short(token)} of level {level} does not hold one code as in <a_17>")
        if len(digits) > 9 or int(digits) >= MAX_CODEBOOK:
            detail = f"code {short(digits)} is out of range [0, {MAX_CODEBOOK}) at level {level}"
            raise BadRow("code-out-of-range", detail)
        levels.append((f"{match[1]}{{}}{match[3]}", int(digits)))
    return levels


def _item_texts(
    root: Path, index_path: Path, index: dict[str, Any], problems: list[Problem]
) -> dict[str, dict[str, Any]]:
    """The objects of `*.item.json`."""
    path = index_path.with_name(index_path.name.replace(".index.json", ".item.json"))
    if not path.exists():
        return {}
    file, texts = str(path.relative_to(root)), _read_object(root, path, problems)
    for item_id, text in texts.items():
        if item_id not in index:
            problems.append(Problem(file, item_id, "missing-sid", f"the item has no sid in {index_path.name}"))
        elif not isinstance(text, dict):
            problems.append(Problem(file, item_id, "wrong-type", f"an item needs an object, got {short(text)}"))
    return {item_id: text for item_id, text in texts.items() if isinstance(text, dict)}


def _info_titles(root: Path, name: str, written: dict[str, str | None], problems: list[Problem]) -> dict[str, str]:
    """Titles of `info.txt` (or `info/<name>*.txt`), whose Sids must be those of the index.

    Args:
        root: the data folder.
        name: name of the catalogue.
        written: text of the Sid of every item of the index, None for an item that was left out.
        problems: where bad lines go.
    """
    titles = {}
    for path in sorted(root.glob("info.txt")) or sorted(root.glob(f"info/{name}*.txt")):
        for number, line in read_lines(path):
            sid, _, rest = line.partition("\t")
            title, tab, item_id = rest.rpartition("\t")
            why, detail = "", ""
            if not tab:
                why, detail = "missing-field", f"a line needs sid, title and item id between tabs, got {short(line)}"
            elif item_id not in written:
                why, detail = "unknown-item", f"item {short(item_id)} is not in the index"
            elif (expected := written[item_id]) not in (sid, None):
                why, detail = "sid-mismatch", f"item {item_id} is {short(sid)} here and {expected} in the index"
            if why:
                problems.append(Problem(str(path.relative_to(root)), number, why, detail))
            else:
                titles[item_id] = title
    return titles


def _category(value: Any) -> str:
    """The category as it stands; the first one of a list or of a list's repr."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = python_literal(value, "categories")
        except BadRow:
            return str(value)
    while isinstance(value, list):
        value = value[0] if value else ""
    return value if isinstance(value, str) else ""
