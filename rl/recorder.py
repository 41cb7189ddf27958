"""What a run writes while it trains: metrics line by line, rollouts as Parquet, which checkpoints are whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rewards.protocol import ScoredGroup
from rl.progress import Progress
from rl.task import Task

MARKER = "complete.json"


class Recorder:
    """Writes into one run folder.

    Args:
        folder: the run's folder.
        task: for decoding prompts and items.
        progress: is told each step.
        rollouts_every: write the rollouts of each so-many-th step; 0 never.

    Attributes:
        legal_rate: lowest share of legal rollouts of any step since the process started.
    """

    def __init__(self, folder: Path, task: Task, progress: Progress, *, rollouts_every: int) -> None:
        self.folder, self.task, self.progress, self.rollouts_every = folder, task, progress, rollouts_every
        self.metrics = folder / "metrics.jsonl"
        self.legal_rate = 1.0

    def start_at(self, step: int) -> None:
        """Drop lines of steps after `step`, which a resumed run takes again."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self.metrics.write_text("".join(line + "\n" for line in kept))

    def step(self, step: int, steps: int, logs: dict[str, Any]) -> None:
        """One line of metrics; NaN becomes null, which JSON knows."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
        if "legal_rate" in logs:  # a further pass over a batch draws nothing
            self.legal_rate = min(self.legal_rate, float(logs["legal_rate"]))
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")
        self.progress.update("train", step, steps, clean)

    def rollouts(self, step: int, scored: list[ScoredGroup], advantages_PG: np.ndarray) -> None:
        """Every rollout of a step: prompt, item, rank, rewards, advantage."""
        if not self.rollouts_every or (step - 1) % self.rollouts_every:
            return
        catalog, tokenizer = self.task.decoder.catalog, self.task.tokenizer
        rows = []
        for group, advantages in zip(scored, advantages_PG.tolist(), strict=True):
            sample = group.group.sample
            ranks = {sid: rank for rank, sid in enumerate(group.group.ranking(), start=1)}
            prompt = tokenizer.decode(sample.prompt_ids)
            targets = [catalog.item_ids[item] for item in sample.targets]
            for index, rollout in enumerate(group.group.rollouts):
                items = [item for cluster in rollout.items for item in cluster]
                rows.append(
                    {
                        "step": step,
                        "source": sample.record.source,
                        "prompt": prompt,
                        "targets": targets,
                        "rollout": index,
                        "completion": tokenizer.decode(rollout.token_ids),
                        "items": [catalog.item_ids[item] for item in items],
                        "titles": [catalog.titles[item] for item in items],
                        "rank": ranks[rollout.sids[0]] if rollout.sids else None,
                        "legal": rollout.legal,
                        "finish_reason": rollout.finish_reason,
                        "tokens": len(rollout.token_ids),
                        "text_tokens": rollout.text_tokens,
                        "thought": rollout.thought,
                        "truncated": rollout.truncated,
                        "logp": rollout.logp,
                        "policy_version": rollout.policy_version,
                        **{f"reward/{name}": values[index] for name, values in group.rewards.items()},
                        "reward": group.total[index],
                        "advantage": advantages[index],
                    }
                )
        target = self.folder / "rollouts" / f"step_{step:06d}.parquet"
        target.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), target)

    def checkpoint_complete(self, folder: Path) -> None:
        """Mark a checkpoint as whole: written last, it names every file and its size."""
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        (folder / MARKER).write_text(json.dumps(sizes, indent=2))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there at their sizes; half-written ones are passed over."""
    numbered = [(int(p.name.split("-")[1]), p) for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    return next((path for _, path in sorted(numbered, reverse=True) if _whole(path)), None)


def _whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / MARKER).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut off when the run was killed
        return 1 << 62
