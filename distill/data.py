"""General prompts: what the student answers, without items, while the teacher looks on.

Read from Parquet, JSON, JSON lines and plain text, one file or a folder of them. A row is a chat (`messages`, without
the assistant's last answer), a `prompt`, or an `instruction` with an optional `input`; a plain text is cut into
passages that are to be continued.
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

from distill.vocabulary import SharedVocabulary
from rollout.data.problems import BadRow, DataError, Problem, short
from rollout.data.rows import chat_messages
from rollout.types import Message

ENDINGS = (".parquet", ".json", ".jsonl", ".txt")


@dataclass(frozen=True)
class General:
    """One general prompt.

    Attributes:
        name: where it was read, such as `instructions.json:3`.
        prompt: text, or chat messages.
    """

    name: str
    prompt: str | tuple[Message, ...]


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
                prompts.append(General(f"{file.name}:{number}", _prompt(row)))
            except BadRow as bad:
                problems.append(Problem(file.name, number, bad.why, bad.detail))
    return prompts, problems


@dataclass(frozen=True)
class TextPrompt:
    """A general prompt ready for an engine.

    Attributes:
        name: seeds its draws.
        prompt_ids: its tokens, all of the shared vocabulary.
    """

    name: str
    prompt_ids: tuple[int, ...]


def tokenise_general(
    prompts: Sequence[General],
    tokenizer: PreTrainedTokenizerBase,
    shared: SharedVocabulary,
    max_tokens: int,
) -> tuple[list[TextPrompt], list[Problem]]:
    """Token ids of prompts; those that are too long, empty, or hold item tokens are told and left out.

    Chats go through the tokenizer's chat template; a tokenizer without one writes the messages under each other.
    """
    ready, problems = [], []
    for one in prompts:
        text, special = _written(one.prompt, tokenizer)
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        while special and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        file, _, row = one.name.rpartition(":")
        outside = set(ids) - set(shared.ids.tolist())
        if not ids:
            problems.append(Problem(file, row, "empty-prompt", "the prompt has no token"))
        elif outside:
            tokens = tokenizer.convert_ids_to_tokens(sorted(outside)[:3])
            problems.append(Problem(file, row, "item-token", f"the teacher has no token for {short(tokens)}"))
        elif len(ids) > max_tokens:
            detail = f"the prompt has {len(ids)} tokens, distill.max_prompt_tokens is {max_tokens}"
            problems.append(Problem(file, row, "prompt-too-long", detail))
        else:
            ready.append(TextPrompt(one.name, tuple(ids)))
    return ready, problems


def _written(prompt: str | tuple[Message, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    if isinstance(prompt, str):
        return prompt, True
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)), False
    return "\n".join(message["content"] for message in prompt) + "\n", True


def _prompt(row: Any) -> str | tuple[Message, ...]:
    if not isinstance(row, dict):
        raise BadRow("wrong-type", f"a row must be an object, got {short(row)}")
    if row.get("messages") is not None:
        messages = chat_messages(row["messages"])
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not asked:
            raise BadRow("missing-field", "the chat holds an answer and no question")
        return asked
    text = row.get("prompt")
    if text is None and row.get("instruction") is not None:
        text = "\n".join(part for part in (row["instruction"], row.get("input")) if part) + "\n"
    if text is None:
        raise BadRow("missing-field", "neither messages, prompt nor instruction")
    if not isinstance(text, str) or not text.strip():
        raise BadRow("wrong-type", f"the prompt must be a text that is not empty, got {short(text)}")
    return text


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
            yield number, {"prompt": " ".join(parts[start : start + words])}


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
