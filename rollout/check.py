"""Checks a data folder before training: `python -m rollout.check PATH`.

Exit status: 0 clean, 1 bad rows were found (each is listed), 2 the data cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.schema import DataConfig
from rollout.data import Problem, World, load_world, prepare

_LINE = 400
"""Longest printed line; the whole detail stands in the file of --json."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        world = load_world(args.path, args.format)
        counts = _counts(world)
        problems = list(world.problems)
        if args.tokenizer:
            problems += _check_prompts(world, args, counts)
        if args.json:
            _write_json(Path(args.json), world, counts, problems)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print_table(console, f"{args.path} ({world.format})", ("what", "count"), counts.items())
    if not problems:
        console.print("No bad rows.")
        return 0
    kinds = Counter(problem.why for problem in problems)
    _print_table(console, f"{len(problems)} bad rows", ("kind", "rows"), kinds.most_common())
    _print_problems(console, problems, args.limit)
    return 1


def _parser() -> argparse.ArgumentParser:
    defaults = DataConfig()
    parser = argparse.ArgumentParser(prog="python -m rollout.check", description="Check a data folder before training.")
    parser.add_argument("path", help="folder of the data (for MiniOneRec also one *.index.json)")
    parser.add_argument("--format", default="auto", choices=["auto", "sidrl", "minionerec", "openonerec"])
    parser.add_argument("--tokenizer", metavar="FOLDER", help="also write and measure the prompts with this tokenizer")
    parser.add_argument("--prompt_template", default=defaults.prompt_template, help="as data.prompt_template")
    parser.add_argument("--max_history", type=int, default=defaults.max_history, help="as data.max_history")
    parser.add_argument("--max_prompt_tokens", type=int, default=defaults.max_prompt_tokens, metavar="N")
    parser.add_argument("--limit", type=_limit, default=20, metavar="N", help="bad rows shown per kind; 0 shows all")
    parser.add_argument("--json", metavar="FILE", help="write counts and every bad row to this file")
    return parser


def _limit(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0; 0 shows all")
    return value


def _counts(world: World) -> dict[str, int]:
    """What the folder holds, in the order in which it is shown."""
    catalog = world.catalog
    counts = {
        "items": len(catalog),
        "levels": catalog.format.depth,
        "distinct sids": len(catalog.sids_SL),
        "collisions (items beyond the first of their sid)": catalog.collisions,
        "largest cluster (items of one sid)": int(catalog.cluster_sizes_S.max()),
        "items without a title": sum(not title for title in catalog.titles),
    }
    for split, records in world.splits.items():
        counts[f"{split} rows"] = len(records)
        counts[f"{split} users"] = len({record.user for record in records if record.user})
    return counts


def _check_prompts(world: World, args: argparse.Namespace, counts: dict[str, int]) -> list[Problem]:
    """Write every prompt; adds the longest one's length to the counts."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(args.tokenizer)
    except Exception as error:  # transformers raises many kinds for a folder that holds no tokenizer
        raise ValueError(f"{args.tokenizer}: holds no tokenizer that transformers can read ({error})") from error
    records = [record for split in world.splits.values() for record in split]
    samples, problems = prepare(
        records,
        world.catalog,
        tokenizer,
        template=args.prompt_template,
        max_history=args.max_history,
        max_prompt_tokens=args.max_prompt_tokens,
    )
    counts["longest prompt that fits (tokens)"] = max((len(sample.prompt_ids) for sample in samples), default=0)
    return problems


def _print_table(console: Console, title: str, columns: tuple[str, str], rows: Iterable[tuple[str, int]]) -> None:
    table = Table(title=_printable(title), title_justify="left")
    table.add_column(columns[0])
    table.add_column(columns[1], justify="right")
    for name, count in rows:
        table.add_row(Text(name), f"{count:,}")
    console.print(table)


def _print_problems(console: Console, problems: Sequence[Problem], limit: int) -> None:
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.why].append(problem)
    for kind, rows in by_kind.items():
        shown = rows[: limit or None]
        for problem in shown:
            console.print(_printable(str(problem)))
        if len(rows) > len(shown):
            console.print(Text(f"… and {len(rows) - len(shown):,} more of kind {kind} (--limit 0 shows all)"))


def _printable(text: str) -> Text:
    """One line of bounded length that no control character can disturb."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_LINE])
    return Text(line + ("…" if len(text) > _LINE else ""))


def _write_json(path: Path, world: World, counts: dict[str, int], problems: Sequence[Problem]) -> None:
    data = {"format": world.format, "counts": counts, "problems": [vars(problem) for problem in problems]}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
