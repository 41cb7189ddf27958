"""Amazon reviews into rows: a time window, active users and items, windows of history, a split by time.

Reads the public JSON-lines files of any year: `reviewerID` or `user_id`, `asin` or `parent_asin`, `unixReviewTime`
(seconds) or `timestamp` (seconds or milliseconds); of items `asin` or `parent_asin`, `title`, `description`,
`categories`.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from examples.build.rows import SPLITS, LeftOut, Row, Text, write_rows
from rollout.data.problems import DataError

MONTHS_BACK = 3
MILLISECONDS = 10**11
"""A time above this is in milliseconds: in seconds it would be the year 5138."""


@dataclass(frozen=True)
class Window:
    """What is kept of the reviews.

    Args:
        start: first month, such as 2016-10.
        end: last month.
        min_interactions: reviews that each user and each item must have.
        history: items before the target.
        min_items: with fewer items the window is extended back, three months at a time; 0 never extends it.
        shares: of train, valid and test, in the order of time.
    """

    start: str
    end: str
    min_interactions: int = 5
    history: int = 10
    min_items: int = 10_000
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)

    def __post_init__(self) -> None:
        if month(self.start) > month(self.end):
            raise ValueError(f"start={self.start} is after end={self.end}")
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(f"shares={self.shares} must add up to 1")
        for name in ("min_interactions", "history"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Review:
    """Who took what, when (seconds)."""

    user: str
    item: str
    time: float


def month(text: str) -> int:
    """Months since year 0 of `2016-10`."""
    try:
        parsed = datetime.strptime(text, "%Y-%m")
    except ValueError as error:
        raise ValueError(f"{text!r} is no month such as 2016-10") from error
    return 12 * parsed.year + parsed.month - 1


def build_amazon(
    reviews: Path, metadata: Path | None, out: Path, window: Window
) -> tuple[dict[str, int], LeftOut, str]:
    """Write a folder of rows; returns its counts, what was left out, and the first month that was used.

    Raises:
        DataError: when a file cannot be read, or no user is active enough.
    """
    left = LeftOut()
    every = read_reviews(reviews, left)
    first, last = month(window.start), month(window.end)
    earliest = min((_month_of(review.time) for review in every), default=first)
    while True:
        kept = active([r for r in every if first <= _month_of(r.time) <= last], window.min_interactions)
        enough = len({review.item for review in kept}) >= window.min_items
        if enough or first <= earliest:
            break
        first -= MONTHS_BACK
    left.counts["outside-the-window"] = sum(not first <= _month_of(review.time) <= last for review in every)
    left.counts["too-few-interactions"] = len(every) - left.counts["outside-the-window"] - len(kept)
    names = {review.item for review in kept}
    known = read_metadata(metadata, names, left) if metadata else {}
    left.counts["item-without-metadata"] = len(names - known.keys()) if metadata else 0
    left.counts = Counter({why: count for why, count in left.counts.items() if count})
    items = {item: known.get(item, Text()) for item in sorted(names)}
    rows = windows(kept, window.history)
    splits = by_time(rows, window.shares)
    end = splits["train"][-1][0] if splits["train"] else 0.0
    sequences: dict[str, list[str]] = {}
    for review in kept:  # in time order; what is learned from ends where the rows of valid begin
        if review.time <= end:
            sequences.setdefault(review.user, []).append(review.item)
    plain = {name: [row for _, row in some] for name, some in splits.items()}
    found = write_rows(out, items, plain, sequences, left)
    return found, left, f"{first // 12}-{first % 12 + 1:02d}"


def read_reviews(file: Path, left: LeftOut) -> list[Review]:
    """Every review, in the order of time; the same review of the same item at the same time counts once.

    Raises:
        DataError: when the file cannot be read, or no line is a review.
    """
    found: dict[tuple[str, str, float], Review] = {}
    for number, row in _lines(file, left):
        user = row.get("reviewerID") or row.get("user_id")
        item = row.get("parent_asin") or row.get("asin")
        time = row.get("unixReviewTime") if row.get("unixReviewTime") is not None else row.get("timestamp")
        if not isinstance(user, str) or not isinstance(item, str) or not isinstance(time, int | float):
            left.add(file.name, number, "missing-field", "a review needs a user, an item and a time")
            continue
        review = Review(user, item, time / 1000 if time > MILLISECONDS else float(time))
        if (user, item, review.time) in found:
            left.add(file.name, number, "repeated-review", f"{user} reviewed {item} at that time already")
        else:
            found[user, item, review.time] = review
    if not found:
        raise DataError(f"{file}: holds no review; left out were {dict(left.counts) or 'none'}")
    return sorted(found.values(), key=lambda review: (review.time, review.user, review.item))


def read_metadata(file: Path, wanted: set[str], left: LeftOut) -> dict[str, Text]:
    """Texts of the wanted items.

    Raises:
        DataError: when the file cannot be read.
    """
    texts: dict[str, Text] = {}
    for _, row in _lines(file, left):
        item = row.get("parent_asin") or row.get("asin")
        if item in wanted:
            categories = row.get("categories") or row.get("category") or []
            flat = [one for part in categories for one in (part if isinstance(part, list) else [part])]
            texts[item] = Text(_line(row.get("title")), _line(row.get("description")), " > ".join(map(str, flat)))
    return texts


def active(reviews: list[Review], least: int) -> list[Review]:
    """Reviews of users and items that have at least so many each, among themselves (the k-core)."""
    while True:
        users, items = (Counter(getattr(review, name) for review in reviews) for name in ("user", "item"))
        kept = [review for review in reviews if users[review.user] >= least and items[review.item] >= least]
        if len(kept) == len(reviews):
            return kept
        reviews = kept


def windows(reviews: list[Review], history: int) -> list[tuple[float, Row]]:
    """A row for each review but a user's first: the target, and up to so many items before it; in the order of time."""
    before: dict[str, list[str]] = {}
    rows = []
    for review in reviews:
        seen = before.setdefault(review.user, [])
        if seen:
            rows.append((review.time, Row(review.user, tuple(seen[-history:]), (review.item,))))
        seen.append(review.item)
    return rows


def by_time(rows: list[tuple[float, Row]], shares: tuple[float, float, float]) -> dict[str, list[tuple[float, Row]]]:
    """The earliest share to train, the next to valid, the last to test."""
    one = round(shares[0] * len(rows))
    two = round((shares[0] + shares[1]) * len(rows))
    return dict(zip(SPLITS, (rows[:one], rows[one:two], rows[two:]), strict=True))


def _lines(file: Path, left: LeftOut) -> Iterator[tuple[int, Mapping[str, Any]]]:
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:  # type: ignore[operator]
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    yield number, row
                else:
                    left.add(file.name, number, "no-json", "the line is no JSON object")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{file}: cannot be read as JSON lines: {error}") from error


def _month_of(time: float) -> int:
    moment = datetime.fromtimestamp(time, UTC)
    return 12 * moment.year + moment.month - 1


def _line(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
