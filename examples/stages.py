"""What stages of examples share: modules run one after another, folders that appear whole, checks that are told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rl.progress import console
from rollout.data.problems import DataError


def run_module(module: str, options: Sequence[str], log: Path, *, threads: int = 0) -> None:
    """Run a module; what it prints goes to the end of `log`.

    Args:
        module: such as `rl.train`.
        options: its command line.
        log: text file.
        threads: CPU threads; 0 leaves them to the module.

    Raises:
        ValueError: when it failed.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        done = subprocess.run([sys.executable, "-m", module, *options], stdout=out, stderr=out, env=environment)
    if done.returncode:
        raise ValueError(f"{module} failed; the end of {log} says why")
    console.print(f"{log.parent}: {module} done", markup=False)


def appearing(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder that appears whole or not at all.

    Raises:
        DataError: when it is there already.
    """
    if out.exists():
        raise DataError(f"{out}: exists already; remove it or write elsewhere")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def tell_checks(checks: Iterable[tuple[str, str]]) -> None:
    """Print checks, each a name and what is wrong ("" for nothing); exit status 1 when something is."""
    wrong = 0
    for name, problem in checks:
        console.print(f"{'wrong' if problem else 'right':6} {name}{': ' + problem if problem else ''}", markup=False)
        wrong += bool(problem)
    if wrong:
        raise SystemExit(1)
