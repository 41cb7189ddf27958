"""The whole way from raw sequences to a post-trained policy, on a tiny scale; and the baseline it stands beside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.beauty.sasrec import evaluate_sasrec, train_sasrec
from rl.progress import Progress
from rollout.catalog import Catalog
from rollout.data.world import World
from rollout.sid import letters_format
from rollout.types import Record
from tests.rl.conftest import quiet_environment


def rings(users: int = 60) -> World:
    """Each user goes round one of three rings of five items."""
    codes = np.stack(np.unravel_index(np.arange(15), (4, 4)), axis=1)
    catalog = Catalog.build(letters_format((4, 4)), [str(item) for item in range(15)], codes)
    splits: dict[str, list[Record]] = {"train": [], "valid": [], "test": []}
    for user in range(users):
        items = tuple(5 * (user % 3) + (user + step) % 5 for step in range(8))
        for split, places in (("train", range(1, 6)), ("valid", [6]), ("test", [7])):
            splits[split] += [Record(f"{split}:{user}", str(user), items[:at], (items[at],), (1.0,)) for at in places]
    return World(catalog, {name: tuple(rows) for name, rows in splits.items()}, (), "sidrl")


def test_sasrec_learns() -> None:
    world = rings()
    shape = {"width": 16, "epochs": 60, "patience": 60, "batch": 16, "dropout": 0.1, "learning_rate": 1e-2}
    model = train_sasrec(world, Progress(), **shape)  # type: ignore[arg-type]
    found = evaluate_sasrec(model, world, "test", width=10)
    assert found["hr@1"] > 0.95 and found["ndcg@10"] > 0.95


def run(folder: Path, file: Path) -> str:
    command = [
        sys.executable, "-m", "examples.beauty", "--file", str(file), "--folder", str(folder), "--tiny",
        "--rollout.engine=hf", "--rollout.cpus_per_engine=0.1", "--ray.trainer_cpus=0.1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=quiet_environment("beauty"), timeout=280)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:] + (folder / "log.txt").read_text()[-2000:]
    return done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_from_sequences_to_a_policy(tmp_path: Path) -> None:
    """Every stage by its own command; a second call finds all of them done."""
    rng = np.random.default_rng(0)
    lines = [" ".join([f"u{user}", *(f"i{item}" for item in rng.integers(0, 40, 4 + user % 5))]) for user in range(80)]
    (tmp_path / "sequences.txt").write_text("\n".join(lines) + "\n")
    said = run(tmp_path / "run", tmp_path / "sequences.txt")
    assert "| TIGER, published | 0.0454 | 0.0321 | 0.0648 | 0.0384 |" in said
    assert "| policy after GRPO |" in said and said.count(" done") == 8
    again = run(tmp_path / "run", tmp_path / "sequences.txt")
    assert again.count(" done") == 0 and again.splitlines()[-1] == said.splitlines()[-1]
