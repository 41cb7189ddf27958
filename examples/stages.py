"""Stages of an example: modules run one after another, each in a process of its own, finished ones not again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rl.progress import console


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
