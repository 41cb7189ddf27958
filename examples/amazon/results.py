"""Train on Amazon Industrial with several seeds and print the rows of `docs/results.md`.

    python -m examples.amazon.results --seeds 0 1 2 [any option of rl.train]

Each seed has a warm policy and a split of users of its own. Finished runs are read again, not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

CONFIG = Path(__file__).parents[2] / "configs" / "amazon_industrial.yaml"
KEYS = ("hr@1", "hr@5", "hr@10", "hr@50", "ndcg@5", "ndcg@10", "ndcg@50", "coverage@10", "unconstrained_legal")


def main() -> None:
    """Run the seeds one after the other, then print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/amazon"))
    known, options = parser.parse_known_args()
    summaries = [_run(seed, known.folder / f"seed{seed}", options) for seed in known.seeds]
    print(f"| seed | when | {' | '.join(KEYS)} | seconds |")
    print(f"| --- | --- |{' ---: |' * (len(KEYS) + 1)}")
    for summary in summaries:
        for when in ("before", "after"):
            cells = " | ".join(f"{summary[when][key]:.4f}" for key in KEYS)
            print(f"| {summary['seed']} | {when} | {cells} | {summary['seconds'] if when == 'after' else ''} |")
    for when in ("before", "after"):
        cells = " | ".join(f"**{np.mean([summary[when][key] for summary in summaries]):.4f}**" for key in KEYS)
        print(f"| mean | {when} | {cells} | |")


def _run(seed: int, folder: Path, options: list[str]) -> dict[str, dict[str, float]]:
    summary = folder / "summary.json"
    if not summary.exists():
        where = ["--resume", str(folder)] if (folder / "config.yaml").exists() else ["--output_dir", str(folder)]
        command = [sys.executable, "-m", "rl.train", "--config", str(CONFIG), "--seed", str(seed), *where, *options]
        subprocess.run(command, check=True)
    return json.loads(summary.read_text())


if __name__ == "__main__":
    main()
