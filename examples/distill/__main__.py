"""What RL costs in general ability, and what distillation wins back: the table and picture of `docs/results.md`.

    python -m examples.distill --seeds 0 1 2 --jobs 3

A small policy is trained on items and on general tasks together, then post-trained by RL on the demo world's
recommendations alone, then distilled from what it was before RL, on the training prompts of the general tasks: once on
these prompts alone, once mixed with recommendation prompts on which it is held to what RL made of it. Held-out general
tasks and recommendations are measured at each point. Finished stages are read again.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from examples.distill.tasks import write_tasks
from examples.stages import run_module
from rl.progress import console, fail_clearly

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
KEYS = ("general/exact", "general/perplexity", "hr@10", "ndcg@10", "hr@1")
POINTS = ("before RL", "after RL", "distilled, general prompts alone", "distilled, mixed")
KEPT = ("hr@10", "ndcg@10")
COLOURS = ("#999999", "#D55E00", "#56B4E9", "#0072B2")


def main() -> None:
    """Run what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, which share the CPUs")
    parser.add_argument("--folder", type=Path, default=Path("runs/distill"))
    parser.add_argument("--steps", type=int, default=300, help="steps of RL")
    parser.add_argument("--distill-steps", type=int, default=150)
    parser.add_argument("--weight", type=float, default=1.0, help="distill.recommendation of the mixed run")
    known, options = parser.parse_known_args()

    def one(seed: int) -> list[dict[str, Any]]:
        return run(known.folder / f"seed{seed}", seed, known, options)

    with ThreadPoolExecutor(known.jobs) as pool:
        results = list(pool.map(one, known.seeds))
    print(table(results))
    draw(results, known.folder / "distill.png")


def run(folder: Path, seed: int, known: argparse.Namespace, options: list[str]) -> list[dict[str, Any]]:
    """Metrics of one seed at the three points."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = write_tasks(folder, seed)
    log = folder / "log.txt"
    threads = max(1, (os.cpu_count() or 1) // known.jobs)
    policy = folder / "policy"
    if not (policy / "config.json").exists():
        run_module("examples.distill.cotrain", [str(policy), str(train), str(seed)], log, threads=threads)
    # The policy's heads are 40 wide, for which vLLM has no code on CPU.
    common = ["--config", str(CONFIG), f"--seed={seed}", f"--eval.general={test}", "--rollout.engine=hf", *options]
    rl = folder / "rl"
    if not (rl / "summary.json").exists():
        more = [f"--model.path={policy}", f"--rl.steps={known.steps}", "--output.merged_model=true"]
        run_module("rl.train", [*common, *more, f"--output_dir={rl}"], log, threads=threads)
    distilled = {folder / "alone": 0.0, folder / "mixed": known.weight}
    for out, weight in distilled.items():
        if not (out / "summary.json").exists():
            more = [
                f"--model.path={rl / 'merged'}",
                f"--distill.teacher={policy}",
                f"--distill.prompts={train}",
                "--distill.every=1",
                "--distill.prompts_per_step=64",
                "--distill.max_tokens=12",
                f"--distill.recommendation={weight}",
                f"--rl.steps={known.distill_steps}",
                "--eval.before=false",
            ]
            run_module("distill.train", [*common, *more, f"--output_dir={out}"], log, threads=threads)
    first, *later = (json.loads((path / "summary.json").read_text()) for path in (rl, *distilled))
    return [first["before"], first["after"], *(summary["after"] for summary in later)]


def table(results: list[list[dict[str, Any]]]) -> str:
    """Means over seeds at each point with their standard deviations, and what distillation won back and kept."""
    lines = ["| | " + " | ".join(KEYS) + " | won back | " + " | ".join(f"{key} kept" for key in KEPT) + " |"]
    lines.append("| --- |" + " ---: |" * (len(KEYS) + 1 + len(KEPT)))
    for index, point in enumerate(POINTS):
        columns = [[result[index][key] for result in results] for key in KEYS]
        cells = [f"{np.mean(values):.3f} ± {np.std(values):.3f}" for values in columns]
        shares = [f"{low:.0%} to {high:.0%}" for low, high in _spans(results, index)] if index > 1 else [""] * 3
        lines.append(f"| {point} | {' | '.join([*cells, *shares])} |")
    return "\n".join(lines)


def _spans(results: list[list[dict[str, Any]]], index: int) -> list[tuple[float, float]]:
    """Lowest and highest over seeds: share of the lost answers won back, and shares of RL's metrics kept."""
    rows = []
    for before, after, *later in results:
        now, lost = later[index - 2], before["general/exact"] - after["general/exact"]
        back = (now["general/exact"] - after["general/exact"]) / lost if lost > 0 else float("nan")
        rows.append([back, *(now[key] / after[key] for key in KEPT)])
    return list(zip(np.min(rows, axis=0).tolist(), np.max(rows, axis=0).tolist(), strict=True))


def draw(results: list[list[dict[str, Any]]], out: Path) -> None:
    """General ability against NDCG@10: RL goes right and down, distillation goes up again."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for seed, points in enumerate(results):
        xs, ys = ([point[key] for point in points] for key in ("ndcg@10", "general/exact"))
        for start, end in ((0, 1), (1, 2), (1, 3)):
            axes.plot([xs[start], xs[end]], [ys[start], ys[end]], color="0.75", linewidth=1.2, zorder=1)
        for x, y, marker, colour, name in zip(xs, ys, "os^D", COLOURS, POINTS, strict=True):
            axes.scatter(x, y, marker=marker, color=colour, s=60, zorder=2, label=name if seed == 0 else None)
    axes.set(xlabel="NDCG@10 of the recommendations", ylabel="general answers met to the letter", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(out, format="png")
    console.print(f"drew {out}", markup=False)


if __name__ == "__main__":
    with fail_clearly():
        main()
