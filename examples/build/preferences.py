"""Yes/no preference questions answered by a chat API, the right ones kept for SFT (an optional step before RL).

For a row of a data folder: the history, and an item that the user then took, or did not. Any OpenAI-compatible API
answers (the `openai` client); answers are saved as they come, so that a run that breaks off goes on where it was. Right
answers become chats that `examples.pretrain` learns from.

    python -m examples.build preferences --data world --out preferences --model MODEL --base_url http://localhost:8000/v1
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.build.shards import chat, write_split
from rollout.data.problems import DataError
from rollout.data.world import World

ANSWERS = "answers.jsonl"
SYSTEM = "You judge what a user wants. Answer with yes or no alone."
NEGATIVES = 50
"""Draws for an item that the user has not taken."""


@dataclass(frozen=True)
class Question:
    """A question whose answer is known.

    Attributes:
        name: of the row it was made from.
        user: of the row.
        text: what is asked.
        right: `yes` or `no`.
    """

    name: str
    user: str
    text: str
    right: str


def questions(world: World, count: int, *, max_history: int, seed: int) -> Iterator[Question]:
    """So many questions from train rows, as many with yes as with no, by the items' titles.

    Raises:
        DataError: when no train row has titles.
    """
    catalog, rng = world.catalog, np.random.default_rng(seed)
    records = [row for row in world.splits.get("train", ()) if row.history and catalog.titles[row.targets[0]]]
    if not records:
        raise DataError("no train row has a history and a titled target: preferences are asked by titles")
    for number, row in enumerate(rng.permutation(len(records))[:count].tolist()):
        record = records[row]
        item, right = record.targets[0], "yes"
        if number % 2:
            taken = {*record.targets, *record.history}
            draws = rng.integers(0, len(catalog), NEGATIVES).tolist()
            others = [other for other in draws if other not in taken and catalog.titles[other]]
            if not others:
                continue
            item, right = others[0], "no"
        seen = "; ".join(catalog.titles[one] for one in record.history[-max_history:] if catalog.titles[one])
        text = f"A user has chosen: {seen}. Will the user choose {catalog.titles[item]} next?"
        yield Question(record.source, record.user, text, right)


def ask_all(
    asked: list[Question], out: Path, answer: Callable[[str, str], str], report: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Answers to all questions, those that are in `answers.jsonl` already not asked again.

    Args:
        asked: the questions.
        out: folder of the answers, one JSON line each as soon as it is there.
        answer: system and user text to the model's answer.
        report: called with done and all.

    Raises:
        DataError: when earlier answers cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / ANSWERS
    known = _earlier(file)
    with file.open("a", encoding="utf-8") as lines:
        for number, question in enumerate(asked):
            if question.text not in known:
                said = answer(SYSTEM, question.text)
                known[question.text] = {"question": question.text, "right": question.right, "said": said}
                lines.write(json.dumps(known[question.text], ensure_ascii=False) + "\n")
                lines.flush()
            report(number + 1, len(asked))
    return [known[question.text] for question in asked]


def _earlier(file: Path) -> dict[str, dict[str, Any]]:
    """Answers of an earlier run; a last line that was cut off is dropped from the file."""
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return {row["question"]: row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: earlier answers cannot be read ({error!r}); remove the file to ask anew") from error


def is_right(said: str, right: str) -> bool:
    """Whether an answer's first yes or no is the right one."""
    match = re.search(r"\b(yes|no)\b", said.lower())
    return match is not None and match.group(1) == right


def keep_right(asked: list[Question], answers: list[dict[str, Any]], out: Path) -> dict[str, int]:
    """Write the questions that were answered right as chats; returns counts.

    Raises:
        DataError: when none was.
    """
    kept = [
        chat("preference", SYSTEM, question.text, question.right, think=False, uid=question.user)
        for question, row in zip(asked, answers, strict=True)
        if is_right(row["said"], question.right)
    ]
    if not kept:
        raise DataError(f"{out / ANSWERS}: none of {len(asked)} answers is right: the model cannot teach this")
    write_split(out, "train", kept)
    return {"questions": len(asked), "right": len(kept)}


def chat_api(model: str, base_url: str | None, max_tokens: int = 16) -> Callable[[str, str], str]:
    """Ask an OpenAI-compatible API; the key is that of `OPENAI_API_KEY`, which local servers do not read."""
    import os

    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def answer(system: str, asked: str) -> str:
        turns: Any = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
        found = client.chat.completions.create(model=model, messages=turns, max_tokens=max_tokens, temperature=0)
        return found.choices[0].message.content or ""

    return answer
