"""What can be wrong with data: a bad row is a `Problem` and is left out, a broken file is a `DataError`."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.types import Record


class DataError(ValueError):
    """A file or folder that cannot be read. The message names it and says what to do."""


class BadRow(Exception):
    """Raised while one row is read; the loader turns it into a `Problem`."""

    def __init__(self, why: str, detail: str) -> None:
        """Kind and detail of the problem."""
        super().__init__(detail)
        self.why = why
        self.detail = detail


@dataclass(frozen=True)
class Problem:
    """One row that was left out.

    Attributes:
        file: path of the file inside the data folder.
        row: line of a text file (the first is 1), row of a Parquet file (the first is 0), key of a JSON object.
        why: kind of problem, a short slug such as `unknown-item`.
        detail: what exactly is wrong.
    """

    file: str
    row: int | str
    why: str
    detail: str

    @classmethod
    def of_record(cls, record: Record, why: str, detail: str) -> Problem:
        """The problem of a row that was already a Record."""
        file, _, row = record.source.rpartition(":")
        return cls(file, int(row) if row.isdecimal() else row, why, detail)

    def __str__(self) -> str:
        """The line that names the row and what is wrong with it."""
        return f"{self.file}:{self.row}: {self.why}: {self.detail}"


def short(value: object, limit: int = 120) -> str:
    """A value as one line of bounded length, for messages."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
