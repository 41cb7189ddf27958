"""Compare recipes on Amazon Industrial: the tables of `docs/results.md`.

    python -m examples.amazon.compare --split valid                                  # to choose
    python -m examples.amazon.compare --split test --recipes continued_sft recommended   # to report, once

Every run starts from the warm policy of its seed, which has a split of users of its own: SFT on 60 % of them, stopped
early on valid, then the recipe on the rows of the other 40 %. Recipes stand in `recipes.yaml` beside this file.
Finished runs are read again, broken-off ones continued. Options that this script does not know go to every run. Other
recipes on another configuration: --config and --file (`examples/demo/algorithms.yaml` for the demo world).
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import t

from examples.stages import run_module
from rl.progress import console, fail_clearly

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "amazon_industrial.yaml"
KEYS = ("hr@1", "hr@5", "hr@10", "hr@50", "ndcg@5", "ndcg@10", "ndcg@50", "coverage@10")
GAINS = ("ndcg@10", "hr@10", "hr@50")

Summary = dict[str, Any]


def main() -> None:
    """Run what is missing, then print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="rows that the table is about")
    parser.add_argument("--file", type=Path, default=HERE / "recipes.yaml", help="the recipes")
    parser.add_argument("--config", type=Path, default=CONFIG, help="what they are put on top of")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="some of them; all if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the CPUs")
    parser.add_argument("--folder", type=Path, default=Path("runs/amazon"))
    parser.add_argument(
        "--against", metavar="NAME", help="gains over this recipe (same seed) instead of over the start"
    )
    known, options = parser.parse_known_args()
    recipes = yaml.safe_load(known.file.read_text())
    names = known.recipes or list(recipes)
    if known.against and known.against not in names:
        names = [known.against, *names]
    if unknown := sorted(set(names) - set(recipes)):
        raise ValueError(f"--recipes {' '.join(unknown)}: {known.file} has {', '.join(recipes)}")
    jobs = [(name, seed) for name in names for seed in known.seeds]

    def job(name_and_seed: tuple[str, int]) -> Summary:
        name, seed = name_and_seed
        folder = known.folder / known.split / name / f"seed{seed}"
        given = [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in recipes[name]["options"].items()]
        more = ["--config", str(known.config), f"--eval.split={known.split}", f"--seed={seed}", *given, *options]
        return run(folder, more, threads=max(1, (os.cpu_count() or 1) // known.jobs))

    with ThreadPoolExecutor(known.jobs) as pool:
        done = dict(zip(jobs, pool.map(job, jobs), strict=True))
    print(table({name: [done[name, seed] for seed in known.seeds] for name in names}, known.against))
    for name in names:
        print(f"- `{name}`: {recipes[name]['about']}")


def run(folder: Path, options: list[str], threads: int) -> Summary:
    """The summary of a run of `rl.train`; what it prints goes to `log.txt` beside it.

    Raises:
        ValueError: when the run failed.
    """
    summary = folder / "summary.json"
    if not summary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        where = "--resume" if (folder / "config.yaml").exists() else "--output_dir"
        run_module("rl.train", [where, str(folder), *options], folder / "log.txt", threads=threads)
        console.print(f"{folder}: {json.loads(summary.read_text())['seconds']:.0f} s", markup=False)
    loaded: Summary = json.loads(summary.read_text())
    return loaded


def table(summaries: dict[str, list[Summary]], against: str | None = None) -> str:
    """Means over the seeds, and the gain over the seed's own start (or recipe) in percent with its 95 % interval.

    The interval is Student's over the seeds: with three of them it is wide.
    """
    head = ["recipe", *KEYS, *(f"{key} over {against or 'start'} %" for key in GAINS), "seconds"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    starts = next(iter(summaries.values()))
    lines.append(_row("start", [one["before"] for one in starts], ["", "", "", ""]))
    for name, runs in summaries.items():
        bases = [one["after"] for one in summaries[against]] if against else [one["before"] for one in runs]
        gains = [
            _interval([100 * (one["after"][key] / base[key] - 1) for one, base in zip(runs, bases, strict=True)])
            for key in GAINS
        ]
        seconds = f"{np.mean([one['seconds'] for one in runs]):.0f}"
        lines.append(_row(name, [one["after"] for one in runs], [*gains, seconds]))
    return "\n".join(lines)


def _row(name: str, values: list[dict[str, float]], more: list[str]) -> str:
    cells = [f"{np.mean([value[key] for value in values]):.4f}" for key in KEYS]
    return "| " + " | ".join([name, *cells, *more]) + " |"


def _interval(gains: list[float]) -> str:
    mean = float(np.mean(gains))
    if len(gains) < 2:
        return f"{mean:+.1f}"
    half = t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / len(gains) ** 0.5
    return f"{mean:+.1f} ± {half:.1f}"


if __name__ == "__main__":
    with fail_clearly():
        main()
