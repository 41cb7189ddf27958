"""The tasks of OpenOneRec from any data folder: chats and running text as Parquet shards.

| task | asked | answer |
| --- | --- | --- |
| `recommendation` (video, ad or product) | history | Sid of the next item |
| `interactive_recommendation` | history and what the user asks for (a category) | Sid |
| `label_conditioned_recommendation` | history and what the user is to do with the item | Sid |
| `label_prediction` | history and an item | yes or no |
| `item_understanding` | an item's Sid | its title and category |
| `recommendation_explanation` | history and the next item | what they have in common |
| `user_profile` | | running text: the user's items, by name and Sid |
| `alignment` | | running text: an item's Sid and what it is |

Sids are written OpenOneRec's way, whatever the data folder's is. Chats that are answered by an item, and the map of
the catalogue (`items.parquet` with `pid` and `sid`), are what `rl.train` reads as OpenOneRec's format; chats answered
in words stand in `answers/`, running text in `text/`. `examples.pretrain` learns chats from the whole folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from examples.build.rows import LeftOut
from examples.build.shards import chat, write_split
from examples.stages import appearing
from rollout.catalog import Catalog
from rollout.data.world import World
from rollout.sid import onerec_format
from rollout.types import Record

DOMAINS = ("video", "ad", "product")
CHATS = (
    "recommendation", "interactive_recommendation", "label_conditioned_recommendation", "label_prediction",
    "item_understanding", "recommendation_explanation",
)  # fmt: skip
TEXTS = ("user_profile", "alignment")
SYSTEM = "You are the recommender of a platform. Items are written as semantic ids."
WORDS = ("label_prediction", "item_understanding", "recommendation_explanation")
"""Chats whose answer is no item: RL on items has nothing to score there, so they have a folder of their own."""

NEEDS_TITLES = ("item_understanding", "recommendation_explanation", "user_profile", "alignment")
NEEDS_CATEGORIES = ("interactive_recommendation", "recommendation_explanation")


def build_tasks(
    world: World,
    out: Path,
    tasks: tuple[str, ...],
    *,
    domain: str,
    think: bool,
    max_history: int,
    seed: int,
) -> tuple[dict[str, int], LeftOut]:
    """Write the tasks of every split; returns rows by task, and what was left out.

    Args:
        world: catalogue and rows.
        out: the folder: `train*.parquet` and so on, `text/` for running text, `items.parquet`.
        tasks: some of the table above.
        domain: what the items are.
        think: answers start with an empty thought.
        max_history: newest items that are named.
        seed: of negatives.

    Raises:
        ValueError: when a task is unknown, or needs titles or categories that nobody has.
    """
    unknown = sorted(set(tasks) - {*CHATS, *TEXTS})
    if unknown:
        raise ValueError(f"tasks {unknown} are none of {', '.join((*CHATS, *TEXTS))}")
    catalog, left = world.catalog, LeftOut()
    lacking = sorted(set(tasks) - set(possible(catalog)))
    if lacking:
        raise ValueError(f"tasks {lacking} need titles or categories, and no item has one: leave them out")
    maker = _Maker(catalog, domain, think, max_history, np.random.default_rng(seed))
    counts: Counter[str] = Counter()

    def write(folder: Path) -> None:
        for split, records in world.splits.items():
            rows = [row for row in _rows(maker, records, tasks, left, split) if row is not None]
            counts.update(row["source"] for row in rows)
            for part, of_part in ((folder, False), (folder / "answers", True)):
                some = [row for row in rows if (row["source"] in WORDS) == of_part]
                if some:
                    write_split(part, split, some)
        texts = [maker.alignment(item) for item in range(len(catalog))] if "alignment" in tasks else []
        if "user_profile" in tasks:
            texts += [maker.user_profile(record) for record in _longest(world.splits.get("train", ()))]
        counts.update(row["source"] for row in texts)
        if texts:
            write_split(folder / "text", "train", texts)
        sids = pa.array(catalog.codes_NL.tolist(), pa.list_(pa.int64()))
        pq.write_table(pa.table({"pid": list(catalog.item_ids), "sid": sids}), folder / "items.parquet")
        left.write(folder, dict(counts))

    appearing(out, write)
    return dict(counts), left


def possible(catalog: Catalog) -> tuple[str, ...]:
    """Tasks that a catalogue has the titles and categories for."""
    without = {*(() if any(catalog.titles) else NEEDS_TITLES), *(() if any(catalog.categories) else NEEDS_CATEGORIES)}
    return tuple(task for task in (*CHATS, *TEXTS) if task not in without)


def _rows(
    maker: _Maker, records: tuple[Record, ...], tasks: tuple[str, ...], left: LeftOut, split: str
) -> Iterator[dict[str, Any] | None]:
    chats = [task for task in tasks if task in CHATS and task != "item_understanding"]
    for record in records:
        for task in chats:
            make: Callable[[Record], dict[str, Any] | None] = getattr(maker, task)
            row = make(record)
            if row is None:
                left.add(split, record.source, f"{task}: nothing-to-say", "the item has no title or category")
            yield row
    if "item_understanding" in tasks and split == "train":
        for item in range(len(maker.catalog)):
            row = maker.item_understanding(item)
            if row is None:
                left.add("items", maker.catalog.item_ids[item], "item_understanding: nothing-to-say", "no title")
            yield row


def _longest(records: tuple[Record, ...]) -> list[Record]:
    """Each user's row with the longest history."""
    found: dict[str, Record] = {}
    for record in records:
        name = record.user or record.source
        if name not in found or len(record.history) > len(found[name].history):
            found[name] = record
    return list(found.values())


class _Maker:
    def __init__(self, catalog: Catalog, domain: str, think: bool, max_history: int, rng: np.random.Generator) -> None:
        if domain not in DOMAINS:
            raise ValueError(f"domain={domain!r} must be one of {', '.join(DOMAINS)}")
        self.catalog, self.domain, self.think, self.max_history, self.rng = catalog, domain, think, max_history, rng
        self.format = onerec_format(catalog.format.sizes)

    def sid(self, item: int) -> str:
        return self.format.format(tuple(self.catalog.codes_NL[item].tolist()))

    def about(self, item: int) -> str:
        return " · ".join(part for part in (self.catalog.titles[item], self.catalog.categories[item]) if part)

    def history(self, record: Record) -> str:
        seen = "".join(self.sid(item) for item in record.history[-self.max_history :])
        return f"A user has chosen these {self.domain}s, the oldest first: {seen or 'none yet'}\n"

    def row(self, task: str, record: Record | None, asked: str, answer: str) -> dict[str, Any]:
        user = {"uid": record.user} if record else {}
        return chat(task, SYSTEM, asked, answer, think=self.think, **user)

    def recommendation(self, record: Record) -> dict[str, Any]:
        task = f"{self.domain}_recommendation"
        return self.row(
            task, record, f"{self.history(record)}Which {self.domain} is next?", self.sid(record.targets[0])
        )

    def interactive_recommendation(self, record: Record) -> dict[str, Any] | None:
        category = self.catalog.categories[record.targets[0]]
        asked = f"{self.history(record)}The user asks for something in {category}. Which {self.domain} is it?"
        return self.row("interactive_recommendation", record, asked, self.sid(record.targets[0])) if category else None

    def label_conditioned_recommendation(self, record: Record) -> dict[str, Any]:
        asked = f"{self.history(record)}Which {self.domain} will the user choose, and not pass over?"
        return self.row("label_conditioned_recommendation", record, asked, self.sid(record.targets[0]))

    def label_prediction(self, record: Record) -> dict[str, Any]:
        """The target or, as often, another item."""
        item, answer = record.targets[0], "yes"
        if self.rng.random() < 0.5:
            taken = {*record.targets, *record.history}
            others = [other for other in self.rng.integers(0, len(self.catalog), 20).tolist() if other not in taken]
            if others:
                item, answer = others[0], "no"
        asked = f"{self.history(record)}Will the user choose {self.sid(item)}? Answer yes or no."
        return self.row("label_prediction", record, asked, answer)

    def item_understanding(self, item: int) -> dict[str, Any] | None:
        about = self.about(item)
        return self.row("item_understanding", None, f"What is {self.sid(item)}?", about) if about else None

    def recommendation_explanation(self, record: Record) -> dict[str, Any] | None:
        target = record.targets[0]
        category = self.catalog.categories[target]
        alike = [item for item in record.history if category and self.catalog.categories[item] == category]
        if not alike or not self.catalog.titles[target]:
            return None
        named = self.catalog.titles[alike[-1]] or self.sid(alike[-1])
        answer = (
            f"{self.catalog.titles[target]} is in {category}, like {len(alike)} of the user's {len(record.history)} "
            f"{self.domain}s, the last of them {named}."
        )
        asked = f"{self.history(record)}Why is {self.sid(target)} recommended?"
        return self.row("recommendation_explanation", record, asked, answer)

    def user_profile(self, record: Record) -> dict[str, Any]:
        """Segments: a sentence, then each item by name and Sid."""
        items = [*record.history, *record.targets][-self.max_history :]
        parts = [f"A user's {self.domain}s, the oldest first."]
        parts += [f" {self.about(item)} {self.sid(item)}".replace("  ", " ") for item in items]
        segments = [{"type": "text", "text": part} for part in parts]
        return {"source": "user_profile", "segments": segments, "metadata": {"uid": record.user}}

    def alignment(self, item: int) -> dict[str, Any]:
        about = self.about(item) or f"a {self.domain}"
        return {"source": "alignment", "text": f"{self.sid(item)} is {about}.", "metadata": {}}
