"""`python -m rewards` lists every reward; `python -m rewards ndcg@10` explains one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewards.plugins import installed, origin
from rewards.protocol import RewardError
from rewards.registry import BUILTINS, parameters, resolve


def main(arguments: list[str]) -> int:
    """Print the table, or the docstring of the one reward that is named; returns the exit status."""
    console = Console()
    if not arguments:
        console.print(_table())
        return 0
    if len(arguments) > 1 or arguments[0].startswith("-"):
        console.print("usage: python -m rewards [NAME]   (NAME as in `rewards: [{reward: NAME}]`)", markup=False)
        return 0 if arguments[0] in ("-h", "--help") else 2
    try:
        target, from_name = resolve(arguments[0])
    except RewardError as error:
        print(f"reward {arguments[0]!r}: {error}", file=sys.stderr)
        return 2
    by_name = "".join(f" with {key}={value}" for key, value in from_name.items())
    name = getattr(target, "__name__", type(target).__name__)
    console.print(Text(f"{arguments[0]}: {name}({parameters(target)}){by_name}\n", "bold"), soft_wrap=True)
    console.print(Text(inspect.getdoc(target) or "(no docstring)"), soft_wrap=True)
    return 0


def _table() -> Table:
    table = Table(title="Rewards", title_justify="left")
    for column in ("name", "what it pays", "params", "from"):
        table.add_column(column, overflow="fold")
    for name, target in BUILTINS.items():
        takes_k = "k" in inspect.signature(target).parameters
        table.add_row(Text(f"{name}@k" if takes_k else name), *_described(target), Text("built in"))
    for name, points in installed().items():
        try:
            table.add_row(Text(name), *_described(resolve(name)[0]), Text(origin(points[0])))
        except RewardError as error:
            table.add_row(Text(name), Text(str(error), "red"), Text(""), Text(origin(points[0])))
    return table


def _described(target: Callable[..., Any]) -> tuple[Text, Text]:
    return Text((inspect.getdoc(target) or "").partition("\n")[0]), Text(parameters(target))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
