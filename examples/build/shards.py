"""OpenOneRec's Parquet schema: shards of about 1,000 rows with uuid, source, messages, segments, text, metadata."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 1000
"""Rows of a shard."""

SCHEMA = pa.schema([(name, pa.string()) for name in ("uuid", "source", "messages", "segments", "text", "metadata")])
SPACE = uuid.UUID("6f4e6a52-6d0e-4c3c-9a52-5f1d6c1d1e0a")
"""Names of rows are made from their content in this space, so that the same data gives the same files."""

NO_THOUGHT = "<think>\n\n</think>\n\n"
"""What Qwen3 writes where it does not think."""


def chat(source: str, system: str, asked: str, answer: str, *, think: bool, **metadata: Any) -> dict[str, Any]:
    """A row in chat format.

    Args:
        source: the task.
        system: what the model is.
        asked: the user's turn.
        answer: the assistant's.
        think: start the answer with an empty thought.
        metadata: further fields, such as `user`.
    """
    turns = [
        {"role": "system", "content": system},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": (NO_THOUGHT if think else "") + answer},
    ]
    return {"source": source, "messages": [turn for turn in turns if turn["content"]], "metadata": metadata}


def write_split(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> int:
    """Write rows as `name.parquet`, or `name-00000.parquet` and so on where they are many; returns how many files.

    `messages`, `segments` and `metadata` are written as JSON text, as OpenOneRec does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = [rows[start : start + ROWS] for start in range(0, max(len(rows), 1), ROWS)]
    for number, some in enumerate(shards):
        written = [_written(row) for row in some]
        table = pa.table({field: [row.get(field) for row in written] for field in SCHEMA.names}, schema=SCHEMA)
        file = f"{name}.parquet" if len(shards) == 1 else f"{name}-{number:05d}.parquet"
        pq.write_table(table, folder / file)
    return len(shards)


def _written(row: Mapping[str, Any]) -> dict[str, str | None]:
    texts = {
        field: value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for field, value in row.items()
    }
    return {"uuid": str(uuid.uuid5(SPACE, json.dumps(texts, sort_keys=True))), **texts}
