"""What a model is pretrained and fine-tuned on: rows of token ids with the positions that are learned.

A source is a file or folder. Chats are learned at the assistant's turns only, running text throughout, rows of a data
folder (`rollout.data`) either as users' whole sequences or as next items.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets, interleave_datasets
from transformers import PreTrainedTokenizerBase

from examples.build.shards import NO_THOUGHT
from rl.general import read_general
from rl.trl_sft import IGNORED, packed
from rollout.data import load_world
from rollout.data.problems import BadRow, DataError, Problem
from rollout.data.rows import chat_messages
from rollout.types import Message


@dataclass(frozen=True)
class Source:
    """One part of the mixture.

    Args:
        path: file or folder.
        weight: its share of the rows, beside the other weights.
        kind: chat (Parquet with `messages`), text (Parquet with `segments` or `text`, a text file, JSON), sequences
            (users' items of a data folder, oldest first), titles (an item's title and its Sid, both ways); auto looks
            at the files.
        split: of a data folder.
    """

    path: Path
    weight: float = 1.0
    kind: Literal["auto", "chat", "text", "sequences", "titles"] = "auto"
    split: str = "train"


@dataclass(frozen=True)
class Row:
    """A row before it is packed.

    Attributes:
        input_ids: its tokens.
        labels: the same where a token is learned, -100 where not.
    """

    input_ids: list[int]
    labels: list[int]


class RowMaker:
    """Writes rows with a tokenizer.

    Args:
        tokenizer: the model's.
        think: an answer that brings no thought starts with an empty one, as models that think are asked to skip it.
        all_turns: learn what users and system say too.
        max_length: most tokens of a row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        think: bool = False,
        all_turns: bool = False,
        max_length: int = 2048,
    ) -> None:
        self.tokenizer, self.think, self.all_turns, self.max_length = tokenizer, think, all_turns, max_length

    def text(self, text: str) -> Row:
        """Running text, learned throughout, with its end."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, self.tokenizer.eos_token_id]
        return Row(ids, list(ids))

    def chat(self, messages: tuple[Message, ...]) -> Row:
        """A chat, learned at what the assistant says and where it ends.

        Raises:
            BadRow: when no turn is the assistant's.
        """
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRow("empty-target", "no turn of the chat is the assistant's")
        ids: list[int] = []
        labels: list[int] = []
        for turn, message in enumerate(messages):
            assistant = message["role"] == "assistant"
            whole = self._template([*messages[:turn], self._thinking(message)], ask=False)
            before = self._template(list(messages[:turn]), ask=assistant)
            if not whole.startswith(before):
                raise BadRow("chat-template", f"the template rewrites earlier turns at turn {turn}")
            # A turn before this one was written with its thought: what is new is what this turn adds.
            asked = before[len(self._template(list(messages[:turn]), ask=False)) :]
            said = whole[len(before) :]
            for part, learned in ((asked, self.all_turns), (said, assistant or self.all_turns)):
                part_ids = self.tokenizer(part, add_special_tokens=False)["input_ids"]
                ids += part_ids
                labels += part_ids if learned else [IGNORED] * len(part_ids)
        return Row(ids, labels)

    def _thinking(self, message: Message) -> Message:
        said = message["content"]
        if not self.think or message["role"] != "assistant" or "<think>" in said:
            return message
        return {"role": "assistant", "content": NO_THOUGHT + said}

    def _template(self, messages: list[Message], *, ask: bool) -> str:
        if not messages:
            return ""
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False))


def read_source(source: Source, maker: RowMaker) -> tuple[list[Row], list[Problem]]:
    """Rows of a source, and those that were left out.

    Raises:
        DataError: when the source cannot be read, or holds no row.
    """
    kind = detect(source) if source.kind == "auto" else source.kind
    made: dict[str, Any] = {"chat": _chats, "text": _texts, "sequences": _sequences, "titles": _titles}
    rows: list[Row] = []
    problems: list[Problem] = []
    for file, number, build in made[kind](source, maker, problems):
        try:
            row = build()
            if len(row.input_ids) > maker.max_length and kind == "chat":
                raise BadRow("prompt-too-long", f"{len(row.input_ids)} tokens, at most {maker.max_length}")
            rows.append(row)
        except BadRow as bad:
            problems.append(Problem(file, number, bad.why, bad.detail))
    if not rows:
        first = f"; the first of {len(problems)} bad ones: {problems[0]}" if problems else ""
        raise DataError(f"{source.path}: no row of kind {kind}{first}")
    return rows, problems


def detect(source: Source) -> str:
    """The kind of a source by its files."""
    path = source.path
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir() and ((path / "format.json").exists() or list(path.glob("*.index.json"))):
        return "sequences"
    files = _parquets(path)
    return "chat" if any(_has_chats(file) for file in files) else "text"


def mixture(parts: list[tuple[list[Row], float]], *, max_length: int, packing: bool, seed: int) -> Dataset:
    """One data set of all sources, rows drawn by weight until the smallest share is used up.

    Args:
        parts: rows and weight of each source.
        max_length: tokens of a packed row; longer rows are cut into several.
        packing: fill rows up with several texts, one after another.
        seed: order of the rows.

    Raises:
        ValueError: when a weight is not above 0.
    """
    if any(weight <= 0 for _, weight in parts):
        raise ValueError("weights of sources must be above 0; leave a source out instead")
    sets = []
    for rows, _ in parts:
        columns = {name: [getattr(row, name) for row in rows] for name in ("input_ids", "labels")}
        some = Dataset.from_dict(columns).shuffle(seed=seed)
        sets.append(packed(some, max_length) if packing else _cut(some, max_length))
    total = sum(weight for _, weight in parts)
    if len(sets) == 1:
        return sets[0]
    shares = [weight / total for _, weight in parts]
    return interleave_datasets(sets, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")


def _cut(rows: Dataset, max_length: int) -> Dataset:
    if max(map(len, rows["input_ids"])) <= max_length:
        return rows
    short = rows.filter(lambda row: len(row["input_ids"]) <= max_length)
    long = rows.filter(lambda row: len(row["input_ids"]) > max_length)
    return concatenate_datasets([short, packed(long, max_length)])


def _parquets(path: Path) -> list[Path]:
    return sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []


def _chats(source: Source, maker: RowMaker, _: list[Problem]) -> Iterator[tuple[str, int, Any]]:
    for file in _parquets(source.path):
        if not _has_chats(file):
            continue
        for number, row in enumerate(pq.read_table(file, columns=["messages"]).to_pylist()):
            yield file.name, number, lambda row=row: maker.chat(_messages(row["messages"]))


def _has_chats(file: Path) -> bool:
    """Whether a file has messages; running text and catalogues may stand beside chats."""
    if "messages" not in pq.read_schema(file).names:
        return False
    column = pq.read_table(file, columns=["messages"]).column(0)
    return bool(column.null_count < len(column))


def _messages(given: Any) -> tuple[Message, ...]:
    if given is None:
        raise BadRow("missing-field", "messages is null")
    return chat_messages(given)


def _texts(source: Source, maker: RowMaker, problems: list[Problem]) -> Iterator[tuple[str, int | str, Any]]:
    files = [file for file in _parquets(source.path) if {"segments", "text"} & set(pq.read_schema(file).names)]
    for file in files:
        names = [name for name in ("segments", "text") if name in pq.read_schema(file).names]
        for number, row in enumerate(pq.read_table(file, columns=names).to_pylist()):
            yield file.name, number, lambda row=row: maker.text(_running(row))
    if files:
        return
    read, bad = read_general(source.path, 200)
    problems += bad
    for one in read:
        name, _, row = one.name.rpartition(":")
        asked = one.prompt if isinstance(one.prompt, str) else "\n".join(message["content"] for message in one.prompt)
        yield name, row, lambda asked=asked, one=one: maker.text(asked + one.answer)


def _running(row: dict[str, Any]) -> str:
    """The text of a row: `text`, or the parts of `segments` (a JSON list of texts or of {"text": …})."""
    if row.get("text"):
        return str(row["text"])
    try:
        parts = json.loads(row.get("segments") or "[]") if isinstance(row.get("segments"), str) else row.get("segments")
        text = "".join(part if isinstance(part, str) else part["text"] for part in parts or [])
    except (ValueError, KeyError, TypeError) as error:
        raise BadRow("wrong-type", f"segments must be a list of texts: {error!r}") from None
    if not text:
        raise BadRow("missing-field", "neither text nor segments")
    return text


def _sequences(source: Source, maker: RowMaker, problems: list[Problem]) -> Iterator[tuple[str, int | str, Any]]:
    """Each user's longest row of the split: history and targets, as Sids one after another."""
    world = load_world(source.path)
    problems += world.problems
    if source.split not in world.splits:
        raise DataError(f"{source.path}: no split {source.split!r}; it has {', '.join(world.splits)}")
    longest: dict[str, tuple[int, ...]] = {}
    for number, record in enumerate(world.splits[source.split]):
        items = (*record.history, *record.targets)
        name = record.user or f"row {number}"
        if len(items) > len(longest.get(name, ())):
            longest[name] = items
    catalog = world.catalog
    for name, items in longest.items():
        text = "".join(catalog.format.format(tuple(catalog.codes_NL[item].tolist())) for item in items)
        yield source.path.name, name, lambda text=text: maker.text(text)


def _titles(source: Source, maker: RowMaker, problems: list[Problem]) -> Iterator[tuple[str, int | str, Any]]:
    """An item's Sid and what it is, in both directions by turns."""
    world = load_world(source.path)
    problems += world.problems
    catalog = world.catalog
    order = np.arange(len(catalog))
    for item in order.tolist():
        sid = catalog.format.format(tuple(catalog.codes_NL[item].tolist()))
        about = " ".join(part for part in (catalog.titles[item], catalog.categories[item]) if part)
        if not about:
            problems.append(Problem("items", catalog.item_ids[item], "missing-field", "neither title nor category"))
            continue
        yield "items", catalog.item_ids[item], lambda sid=sid, about=about: maker.text(f"{sid} is {about}")
        yield "items", catalog.item_ids[item], lambda sid=sid, about=about: maker.text(f"{about} is {sid}")
