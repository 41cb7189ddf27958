"""Raw data to training sets, each command with counts of what was left out and why.

    python -m examples.build sequences --file sequential_data_processed.txt --out rows
    python -m examples.quantize --sequences rows/sequences.txt --leave_out 0 --out sids
    python -m examples.build world --rows rows --sids sids --out world
    python -m rollout.check world

    python -m examples.build amazon --reviews reviews.json.gz --start 2016-10 --end 2018-11 --out rows
    python -m examples.build kling --file log.tsv --out kling && python -m examples.build check_kling --folder kling
    python -m examples.build tasks --data world --out onerec --domain product
    python -m examples.build preferences --data world --out preferences --model NAME --base_url http://localhost:8000/v1
    python -m examples.build playlists --file playlists.jsonl --sids sids --out world

Folders appear whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from examples.build.amazon import Window, build_amazon
from examples.build.kling import build_kling
from examples.build.kling import check_kling as checks_of_kling
from examples.build.playlists import build_playlists
from examples.build.preferences import ask_all, chat_api, keep_right
from examples.build.preferences import questions as build_questions
from examples.build.rows import LeftOut, Text, counts_of, leave_one_out, read_sequences, with_sids, write_rows
from examples.build.tasks import CHATS, TEXTS, build_tasks, possible
from examples.quantize.sids import SemanticIds
from examples.stages import tell_checks
from rl.progress import Progress, console, fail_clearly
from rollout.data import load_world


def sequences(file: Path, out: Path, every_prefix: bool = True) -> None:
    """Rows from users' item sequences, leave-one-out.

    Args:
        file: a line for each user: the user, then items in time order, separated by spaces.
        out: folder of rows.
        every_prefix: each item of the training part but the first is a target once; else only its last.
    """
    left = LeftOut()
    users = read_sequences(file, left)
    items = {item: Text() for some in users.values() for item in some}
    splits = leave_one_out(users, left, every_prefix=every_prefix)
    learned = {user: some[:-2] for user, some in users.items()}
    found = write_rows(out, items, splits, learned, left)
    console.print(f"{out}: {counts_of(found, left)}", markup=False)


def world(rows: Path, sids: Path, out: Path, style: Literal["letters", "onerec"] = "letters") -> None:
    """A data folder for training, from a folder of rows and the Sids of its items.

    Args:
        rows: what another command here has written.
        sids: what `examples.quantize` has written.
        out: data folder.
        style: how Sids are written: `<a_1><b_2>` or `<|sid_begin|><s_a_1>…`.
    """
    found = with_sids(rows, SemanticIds.load(sids), out, style)
    console.print(f"{out}: {counts_of(found, LeftOut())}; check it: python -m rollout.check {out}", markup=False)


def amazon(
    reviews: Path,
    out: Path,
    start: str,
    end: str,
    metadata: Path | None = None,
    min_interactions: int = 5,
    history: int = 10,
    min_items: int = 10_000,
) -> None:
    """Rows from Amazon reviews: a time window, active users and items, a split by time.

    Args:
        reviews: JSON lines, plain or gzip.
        out: folder of rows.
        start: first month, such as 2016-10.
        end: last month.
        metadata: JSON lines of the items' titles, descriptions and categories.
        min_interactions: reviews that each user and each item must have.
        history: items before the target.
        min_items: with fewer items the window is extended back, three months at a time; 0 never extends it.
    """
    window = Window(start, end, min_interactions, history, min_items)
    found, left, first = build_amazon(reviews, metadata, out, window)
    console.print(f"{out}: from {first} to {end}: {counts_of(found, left)}", markup=False)


def kling(file: Path, out: Path, seed: int = 0) -> None:
    """Items, sequences, behaviours, three training sets and a data folder from a company's log.

    Args:
        file: TSV or CSV with a header.
        out: folder of everything.
        seed: which items are kept to judge alignment by.
    """
    found, left = build_kling(file, out, seed=seed)
    console.print(f"{out}: {counts_of(found, left)}", markup=False)


def check_kling(folder: Path) -> None:
    """The checklist before training; exit status 1 when something is wrong.

    Args:
        folder: what `kling` has written.
    """
    tell_checks(checks_of_kling(folder))


def tasks(
    data: Path,
    out: Path,
    domain: Literal["video", "ad", "product"] = "product",
    tasks: list[str] | None = None,
    think: bool = False,
    max_history: int = 50,
    seed: int = 0,
) -> None:
    """OpenOneRec's tasks from a data folder: chats and running text, about 1,000 rows a file.

    Args:
        data: data folder.
        out: folder of the tasks.
        domain: what the items are.
        tasks: some of the tasks that `examples/build/tasks.py` lists; all that the data has texts for if left out.
        think: answers start with an empty thought.
        max_history: newest items of a user that are named.
        seed: of the items that are asked for in vain.
    """
    loaded = load_world(data)
    chosen = tuple(tasks) if tasks else possible(loaded.catalog)
    for task in () if tasks else [task for task in (*CHATS, *TEXTS) if task not in chosen]:
        console.print(f"{task} is left out: no item has the title or category that it needs", markup=False)
    found, left = build_tasks(loaded, out, chosen, domain=domain, think=think, max_history=max_history, seed=seed)
    console.print(f"{out}: {counts_of(found, left)}", markup=False)


def playlists(
    file: Path, sids: Path, out: Path, style: Literal["letters", "onerec"] = "letters", seed: int = 0
) -> None:
    """A data folder of playlists: a title is the prompt, its songs are right.

    Args:
        file: JSON lines with `title` and `songs`.
        sids: what `examples.quantize` has written for the songs, collisions kept.
        out: data folder.
        style: how Sids are written.
        seed: of the split.
    """
    found, left = build_playlists(file, SemanticIds.load(sids), out, style=style, seed=seed)
    console.print(f"{out}: {counts_of(found, left)}", markup=False)


def preferences(
    data: Path,
    out: Path,
    model: str,
    base_url: str | None = None,
    count: int = 1000,
    max_history: int = 10,
    seed: int = 0,
) -> None:
    """Yes/no preference questions answered by a chat API; the right answers are kept for SFT.

    Args:
        data: data folder whose items have titles.
        out: folder of the answers and of `train*.parquet`.
        model: name of the model that answers.
        base_url: of an OpenAI-compatible API; unset is OpenAI's own.
        count: questions.
        max_history: newest titles of a history that are named.
        seed: which rows, and which items are asked for in vain.
    """
    asked = list(build_questions(load_world(data), count, max_history=max_history, seed=seed))
    progress = Progress()
    with progress.shown():
        answers = ask_all(
            asked, out, chat_api(model, base_url), lambda done, all_: progress.update("asked", done, all_)
        )
    console.print(f"{out}: {counts_of(keep_right(asked, answers, out), LeftOut())}", markup=False)


COMMANDS = (sequences, world, amazon, kling, check_kling, tasks, playlists, preferences)


if __name__ == "__main__":
    with fail_clearly():
        auto_cli({command.__name__: command for command in COMMANDS}, as_positional=False)
