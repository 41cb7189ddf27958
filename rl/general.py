"""General text: prompts to answer, and answers to judge a policy by.

Read from Parquet, JSON, JSON lines and plain text, one file or a folder of them. A row is a chat (`messages`; the
assistant's last one is the answer), a `prompt`, or an `instruction` with an optional `input`; `answer` or `output`
holds the answer. A plain text is cut into passages; the second half of each is the answer to the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from rollout.data.problems import BadRow, DataError, Problem, short
from rollout.data.rows import chat_messages
from rollout.types import Message

PASSAGE = "passage of a running text"
ENDINGS = (".parquet", ".json", ".jsonl", ".txt")


@dataclass(frozen=True)
class General:
    """One general prompt.

    Attributes:
        name: where it was read, such as `instructions.json:3`.
        prompt: text, or chat messages.
        answer: what should follow, "" where the row does not say.
        passage: it is half of a running text, which nobody can be expected to go on with to the letter.
    """

    name: str
    prompt: str | tuple[Message, ...]
    answer: str = ""
    passage: bool = False


def read_general(path: Path, passage_words: int) -> tuple[list[General], list[Problem]]:
    """Every prompt of a file or folder, and the rows that hold none.

    Args:
        path: the file, or a folder whose files of these kinds are read in order.
        passage_words: words of a passage of plain text.

    Raises:
        DataError: when nothing there can be read.
    """
    inside = sorted(p for p in path.rglob("*") if p.suffix in ENDINGS) if path.is_dir() else []
    files = [path] if path.is_file() else inside
    if not files:
        raise DataError(f"{path}: no such file, or a folder without {', '.join(ENDINGS)} files")
    prompts: list[General] = []
    problems: list[Problem] = []
    for file in files:
        for number, row in _rows(file, passage_words):
            try:
                prompts.append(_general(f"{file.name}:{number}", row))
            except BadRow as bad:
                problems.append(Problem(file.name, number, bad.why, bad.detail))
    return prompts, problems


@dataclass(frozen=True)
class TextPrompt:
    """A general prompt ready for an engine.

    Attributes:
        name: seeds its draws.
        prompt_ids: its tokens.
        answer_ids: tokens of the answer and the end of text; empty where there is none.
        exact: whether the answer is to be met to the letter.
    """

    name: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] = ()
    exact: bool = False


def tokenise_general(
    prompts: Sequence[General],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    banned: Sequence[tuple[int, int]] = (),
) -> tuple[list[TextPrompt], list[Problem]]:
    """Token ids of prompts and answers; rows too long, empty, or with banned tokens (items) are told and left out.

    Chats go through the tokenizer's chat template; a tokenizer without one writes the messages under each other.
    """
    ready, problems = [], []
    for one in prompts:
        text, special = _written(one.prompt, tokenizer)
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        while special and ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        answer = list(tokenizer(one.answer, add_special_tokens=False)["input_ids"]) if one.answer else []
        if answer and not one.passage and tokenizer.eos_token_id is not None:
            answer.append(tokenizer.eos_token_id)
        file, _, row = one.name.rpartition(":")
        outside = sorted({token for token in (*ids, *answer) if any(a <= token < b for a, b in banned)})
        if not ids:
            problems.append(Problem(file, row, "empty-prompt", "the prompt has no token"))
        elif outside:
            detail = f"tokens of items in general text: {short(tokenizer.convert_ids_to_tokens(outside[:3]))}"
            problems.append(Problem(file, row, "item-token", detail))
        elif len(ids) + len(answer) > max_tokens:
            detail = f"{len(ids)} tokens of prompt and {len(answer)} of answer, at most {max_tokens} together"
            problems.append(Problem(file, row, "prompt-too-long", detail))
        else:
            ready.append(TextPrompt(one.name, tuple(ids), tuple(answer), bool(answer) and not one.passage))
    return ready, problems


def _written(prompt: str | tuple[Message, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    if isinstance(prompt, str):
        return prompt, True
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)), False
    return "\n".join(message["content"] for message in prompt) + "\n", True


def _general(name: str, row: Any) -> General:
    if not isinstance(row, dict):
        raise BadRow("wrong-type", f"a row must be an object, got {short(row)}")
    answer = row.get("answer") if row.get("answer") is not None else row.get("output")
    if answer is not None and not isinstance(answer, str):
        raise BadRow("wrong-type", f"the answer must be a text, got {short(answer)}")
    if row.get("messages") is not None:
        messages = chat_messages(row["messages"])
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not asked:
            raise BadRow("missing-field", "the chat holds an answer and no question")
        return General(name, asked, messages[-1]["content"] if len(asked) < len(messages) else answer or "")
    text = row.get("prompt")
    if text is None and row.get("instruction") is not None:
        text = "\n".join(part for part in (row["instruction"], row.get("input")) if part) + "\n"
    if text is None:
        raise BadRow("missing-field", "neither messages, prompt nor instruction")
    if not isinstance(text, str) or not text.strip():
        raise BadRow("wrong-type", f"the prompt must be a text that is not empty, got {short(text)}")
    return General(name, text, answer or "", bool(row.get(PASSAGE)))


def _rows(file: Path, passage_words: int) -> Iterator[tuple[int, Any]]:
    if file.suffix == ".txt":
        return _passages(file, passage_words)
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".parquet": _table,
        ".json": _objects,
        ".jsonl": _lines,
    }
    if file.suffix not in readers:
        raise DataError(f"{file}: prompts are read from {', '.join(ENDINGS)} files")
    return readers[file.suffix](file)


def _passages(file: Path, words: int) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        parts = line.split()
        for start in range(0, len(parts), words):
            passage = parts[start : start + words]
            half = (len(passage) + 1) // 2
            rest = " ".join(["", *passage[half:]])
            yield number, {"prompt": " ".join(passage[:half]), "answer": rest, PASSAGE: True}


def _table(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: no Parquet file that can be read: {error}") from error
    yield from enumerate(table.to_pylist())


def _objects(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(_text(file))
    except ValueError as error:
        raise DataError(f"{file}: no JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: must hold a list of rows")
    yield from enumerate(rows)


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, f"no JSON: {error}"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text: {error}") from error
