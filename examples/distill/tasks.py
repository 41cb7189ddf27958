"""General tasks for a small model: copying, sorting, adding, following a format. Each row has one right answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """So many rows, the kinds by turns."""
    rng = np.random.default_rng(seed)

    def letters(size: int) -> str:
        return "".join(rng.choice(list(LETTERS), size))

    rows = []
    for number in range(count):
        word, (a, b) = letters(4), rng.integers(0, 10, 2).tolist()
        prompt, answer = [
            (f"copy {word}: ", word),
            (f"sort {word[:3]}: ", "".join(sorted(word[:3]))),
            (f"{a}+{b}: ", str(a + b)),
            (f"pair {word[0]} {word[1]}: ", f"<{word[0]}={word[1]}>"),
        ][number % 4]
        rows.append({"prompt": prompt, "answer": answer})
    return rows


def write_tasks(folder: Path, seed: int) -> tuple[Path, Path]:
    """Rows to learn from and held-out ones, none of which stands among the former."""
    train = make_rows(6000, 2 * seed)
    known = {row["prompt"] for row in train if not row["prompt"][0].isdigit()}  # all sums of two digits are known soon
    test = [row for row in make_rows(1200, 2 * seed + 1) if row["prompt"] not in known]
    paths = folder / "general_train.json", folder / "general_test.json"
    for path, rows in zip(paths, (train, test), strict=True):
        path.write_text(json.dumps(rows))
    return paths
